//! The frame of a page in HTML, and text in it that can be nothing but text.

use crate::page::{Page, Section};

/// Appends `text` for element content or a quoted attribute. Characters that cannot be seen but change what is seen (control
/// characters, and those that turn the direction of writing) are shown by their numbers; `visible` in `page.js` does the
/// same.
pub(crate) fn push_text(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if is_unseen(c) => out.push_str(&format!("‹U+{:04X}›", u32::from(c))),
            c => out.push(c),
        }
    }
}

fn is_unseen(c: char) -> bool {
    let seen_as_space = matches!(c, '\t' | '\n' | '\r');
    (c.is_control() && !seen_as_space)
        || matches!(c, '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2060}' | '\u{feff}')
        || ('\u{202a}'..='\u{202e}').contains(&c)
        || ('\u{2066}'..='\u{2069}').contains(&c)
}

/// Appends `<TAG class="CLASS">text</TAG>` and a line's end.
pub(crate) fn push_element(out: &mut String, tag: &str, class: &str, text: &str) {
    out.push('<');
    out.push_str(tag);
    if !class.is_empty() {
        out.push_str(&format!(" class=\"{class}\""));
    }
    out.push('>');
    push_text(out, text);
    out.push_str(&format!("</{tag}>\n"));
}

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The whole page; `data` is its JSON, made safe by [`crate::embed::json`].
pub(crate) fn push_page(page: &Page, data: &str) -> String {
    let mut out = String::with_capacity(data.len() * 2 + STYLE.len() + SCRIPT.len());
    let connect = if page.live.is_some() { "; connect-src 'self'" } else { "" };
    out.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    // Before everything that it rules.
    out.push_str(&format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'{connect}\">\n"
    ));
    out.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    out.push_str(
        "<meta name=\"referrer\" content=\"no-referrer\">\n<meta name=\"generator\" content=\"Senmon\">\n",
    );
    // An empty icon: browsers would ask the server for one.
    out.push_str("<link rel=\"icon\" href=\"data:,\">\n");
    push_element(&mut out, "title", "", &page.title);
    out.push_str(&format!("<style>\n{STYLE}</style>\n"));
    // Hides what is only for readers without scripts, before it is painted.
    out.push_str("<script>document.documentElement.classList.add(\"js\")</script>\n</head>\n<body>\n");
    push_head(&mut out, page);
    out.push_str("<main class=\"wide\" id=\"senmon-main\">\n");
    for section in &page.sections {
        push_section(&mut out, section);
    }
    out.push_str("</main>\n");
    if !page.footer.is_empty() {
        out.push_str("<footer class=\"wide\">");
        page.footer.push_paragraph(&mut out, "end");
        out.push_str("</footer>\n");
    }
    out.push_str(&format!("<script type=\"application/json\" id=\"senmon-data\">{data}</script>\n"));
    out.push_str(&format!("<script>\n{SCRIPT}</script>\n</body>\n</html>\n"));
    out
}

fn push_head(out: &mut String, page: &Page) {
    out.push_str("<a class=\"skip\" href=\"#senmon-main\">Skip to the content</a>\n");
    out.push_str("<div class=\"top\"><div class=\"wide\"><nav aria-label=\"Sections\"><ol>\n");
    for section in &page.sections {
        out.push_str("<li><a href=\"#");
        push_text(out, &section.id);
        out.push_str("\">");
        push_text(out, &section.heading);
        out.push_str("</a></li>\n");
    }
    out.push_str("</ol></nav></div></div>\n<header class=\"wide head\">\n");
    push_element(out, "h1", "", &page.title);
    if !page.subtitle.is_empty() {
        push_element(out, "p", "subtitle", &page.subtitle);
    }
    if !page.facts.is_empty() {
        out.push_str("<dl class=\"facts\">\n");
        for (name, value) in &page.facts {
            out.push_str("<div>");
            push_element(out, "dt", "", name);
            push_element(out, "dd", "", value);
            out.push_str("</div>\n");
        }
        out.push_str("</dl>\n");
    }
    out.push_str("</header>\n");
}

fn push_section(out: &mut String, section: &Section) {
    out.push_str("<section id=\"");
    push_text(out, &section.id);
    out.push_str("\" aria-labelledby=\"senmon-h-");
    push_text(out, &section.id);
    out.push_str("\">\n<h2 id=\"senmon-h-");
    push_text(out, &section.id);
    out.push_str("\">");
    push_text(out, &section.heading);
    out.push_str("</h2>\n");
    if !section.intro.is_empty() {
        out.push_str("<div class=\"intro\">\n");
        for paragraph in &section.intro {
            paragraph.push_paragraph(out, "");
        }
        out.push_str("</div>\n");
    }
    out.push_str("<div class=\"blocks\">\n");
    for block in &section.blocks {
        block.push_html(out);
    }
    out.push_str("</div>\n</section>\n");
}

/// The title and note of a chart, as they stand above it without scripts, and its summary.
pub(crate) fn push_caption(out: &mut String, title: &str, note: &crate::Rich, summary: &str) {
    if !title.is_empty() {
        push_element(out, "h3", "", title);
    }
    note.push_paragraph(out, "note");
    if !summary.is_empty() {
        push_element(out, "p", "", summary);
    }
}
