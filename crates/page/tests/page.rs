//! Pages as they are written: nothing in them is more than text, everything is said without scripts, and what contradicts
//! itself is refused.

#![allow(clippy::unwrap_used)]

use senmon_page::{
    Axis, Bars, Best, Block, Cell, Column, Details, Figure, Figures, Format, Heat, Line, Lines, Page,
    PageError, Reference, Rich, Scale, Section, Selector, Table, Text, TokenLayer, Tokens, Tone, Verdict,
};

/// One block of every kind; `word` stands wherever text may.
fn page(word: &str) -> Page {
    let bars = Bars::new(word, [word, "b"])
        .note(word)
        .axes(word, word)
        .series(word, [0.25, f64::NAN])
        .interval([0.2, 0.1], [0.3, 0.2])
        .format(Format::percent(1).unit(word))
        .reference(Reference::new(word, 0.5));
    let lines = Lines::new(word, Axis::new(word), Axis::new(word))
        .note(word)
        .line(Line::new(word, [1.0, 2.0, 3.0], [3.0, f64::NAN, 1.5]).band([2.0, 2.0, 1.0], [4.0, 3.0, 2.0]))
        .reference(Reference::new(word, 2.0));
    let heat = Heat::new(word, [word, "b"], [word, "2"])
        .note(word)
        .axes(word, word, word)
        .values([0.5, 0.25, f64::NAN, 1.0])
        .scale(Scale::diverging(0.0, 0.5, 1.0));
    let mut tokens = Tokens::new(word, word, [word, " b"], 2).note(word).layer(TokenLayer::new(
        word,
        [0, 1, 1, -1],
        [0.75, 0.25, 1.0, 0.0],
    ));
    tokens.names = vec![word.to_owned()];
    let table = Table::new(word, [Column::text(word), Column::number(word, Format::fixed(2).unit(word))])
        .note(word)
        .row([word.into(), 1.5.into()])
        .row([Cell::Missing, word.into()]);
    let paragraph = Rich::new().text(word).strong(word).emphasis(word).code(word).link(word, "one");
    Page::new(word)
        .subtitle(word)
        .fact(word, word)
        .footer(word)
        .section(
            Section::new("one", word)
                .intro(word)
                .block(Text::new(paragraph).paragraph(word))
                .block(Figures::new([Figure::new(word, 0.5).reference(Reference::new(word, 0.25))]))
                .block(Verdict::new(Tone::Good, word, word).note(word))
                .block(table)
                .block(bars)
                .block(lines.clone()),
        )
        .section(
            Section::new("two", "Two")
                .block(heat.clone())
                .block(tokens)
                .block(Details::new(word).block(heat))
                .block(Selector::new(word).variant(word, lines).variant("b", Text::new(word))),
        )
}

/// The HTML of the block `id`, up to the next block or the section's end.
fn block<'a>(html: &'a str, id: &str) -> &'a str {
    let at = html.find(&format!("id=\"{id}\">")).unwrap();
    let rest = &html[at..];
    let end = ["<div class=\"block", "</section>"].iter().filter_map(|end| rest.find(end)).min().unwrap();
    &rest[..end]
}

fn data(html: &str) -> &str {
    let start = "<script type=\"application/json\" id=\"senmon-data\">";
    let at = html.find(start).unwrap() + start.len();
    &html[at..at + html[at..].find("</script>").unwrap()]
}

#[test]
fn hostile_text_stays_text() {
    let tame = page("tame").to_html().unwrap();
    let tags = |html: &str, tag: &str| html.matches(tag).count();
    for hostile in [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "<img src=x onerror=alert(1)>",
        "\" onfocus=\"alert(1)\" x=\"",
        "' autofocus onfocus='alert(1)",
        "</title></style></noscript><svg/onload=alert(1)>",
        "&lt;b&gt; &amp; &#60;",
        "javascript:alert(1)",
        "${alert(1)} `{{1}}` \\u003c",
        "a\0b\u{8}c\u{85}",
        "\u{202e}abc\u{2066}\u{200f}",
        "\u{2028}\u{2029}\u{feff}\u{fffd}\u{10ffff}",
    ] {
        let html = page(hostile).to_html().unwrap();
        for tag in ["<script", "</script", "<img", "<svg", "</style", "</title", "<!--", "<b>"] {
            assert_eq!(tags(&html, tag), tags(&tame, tag), "{tag} in a page of {hostile:?}");
        }
        let quotes = |html: &str| html.replace(data(html), "").matches('"').count();
        assert_eq!(quotes(&html), quotes(&tame), "quotes in a page of {hostile:?}");
        let apostrophes = |html: &str| html.replace(data(html), "").matches('\'').count();
        assert_eq!(apostrophes(&html), apostrophes(&tame), "apostrophes in a page of {hostile:?}");
        let beside = html.replace(data(&html), "");
        for unseen in ['\0', '\u{8}', '\u{85}', '\u{202e}', '\u{2066}', '\u{200f}', '\u{feff}'] {
            assert!(!beside.contains(unseen), "{unseen:?} in a page of {hostile:?}");
        }
        // The data hold the text as it was.
        let read: serde_json::Value = serde_json::from_str(data(&html)).unwrap();
        assert_eq!(read["title"], hostile);
        assert_eq!(read["sections"][1]["blocks"][1]["tokens"][0], hostile);
    }
}

#[test]
fn characters_that_are_not_seen_are_shown_by_number() {
    let html = page("a\u{202e}b\0").to_html().unwrap();
    assert!(html.contains("<h1>a‹U+202E›b‹U+0000›</h1>"));
}

#[test]
fn a_page_is_read_back_from_its_json() {
    let mut page = page("word").live("events");
    // NaN is not equal to itself: what is missing is compared by what is written.
    let written = page.to_json().unwrap();
    let read: Page = serde_json::from_str(&written).unwrap();
    assert_eq!(read.to_json().unwrap(), written);
    assert_eq!(read.to_html().unwrap(), page.to_html().unwrap());
    page.sections.truncate(1);
    page.sections[0].blocks.truncate(4);
    let read: Page = serde_json::from_str(&page.to_json().unwrap()).unwrap();
    assert_eq!(read, page);
    // What may be left out.
    let short = r#"{"title": "t", "sections": [{"id": "s", "heading": "h", "blocks": [
        {"kind": "heat", "title": "m", "rows": ["a"], "columns": ["b", "c"], "values": [1, null]},
        {"kind": "lines", "title": "l", "x": {"label": "x"}, "y": {"label": "y"},
         "series": [{"name": "n", "x": [1, 2], "y": [1, 2]}]}]}]}"#;
    serde_json::from_str::<Page>(short).unwrap().to_html().unwrap();
}

#[test]
fn every_block_is_said_without_scripts() {
    let html = page("word").to_html().unwrap();
    for (id, facts) in [
        (
            "one-1",
            &["<strong>word</strong>", "<em>word</em>", "<code>word</code>", "<a href=\"#one\">word</a>"][..],
        ),
        ("one-2", &["<dt>word</dt>", ">0.5</dd>", ">word 0.25</dd>"]),
        ("one-3", &["verdict good", "<p class=\"sentence\">word</p>"]),
        ("one-4", &["<caption", "<th scope=\"row\">word</th><td class=\"number\">1.50\u{a0}word</td>"]),
        (
            "one-5",
            &["Greatest 25.0%", "For comparison: word 50.0%", "<td class=\"number\">30.0%\u{a0}word</td>"],
        ),
        ("one-6", &["word: from 3 to 1.5, lowest 1.5", "<td class=\"number\">3</td>"]),
        (
            "two-1",
            &["Greatest 1 (word b, word 2), least 0.25 (word word, word 2)", "<td class=\"number\">–</td>"],
        ),
        (
            "two-2",
            &[
                "2 tokens, coloured by word",
                "<p class=\"tokens\">word b</p>",
                "<td class=\"number\">50.0%</td>",
            ],
        ),
        ("two-3", &["<summary>word</summary>"]),
        ("two-3-1", &["<table>"]),
        ("two-4", &["<h3 class=\"static\">word word</h3>"]),
        ("two-4-1", &["<table>"]),
        ("two-4-2", &["<p>word</p>"]),
    ] {
        for fact in facts {
            assert!(block(&html, id).contains(fact), "{id} says {fact:?}:\n{}", block(&html, id));
        }
    }
    // Tables say what they are of, and their headings what they head.
    assert_eq!(html.matches("<table>").count(), html.matches("<caption").count());
    assert!(!html.contains("<th>"));
}

#[test]
fn small_pieces_look_like_this() {
    let columns = [
        Column::text("model"),
        Column::number("loss", Format::fixed(2)).best(Best::Lowest),
        Column::number("experts", Format::integer()),
    ];
    let table = Table::new("Models", columns).row(["a".into(), 3.25.into(), 8usize.into()]).row([
        "b".into(),
        3.0.into(),
        Cell::Missing,
    ]);
    let figures = Figures::new([Figure::new("guessed", 0.5).format(Format::percent(0)).chance(0.25)]);
    let page =
        Page::new("Pieces").section(Section::new("s", "S").block(Block::from(figures).half()).block(table));
    let html = page.to_html().unwrap();
    assert_eq!(
        block(&html, "s-1"),
        "id=\"s-1\">\n<dl class=\"figures\">\n<div><dt>guessed</dt>\n<dd class=\"value\">50%</dd>\n\
         <dd class=\"chance\">chance 25%</dd>\n</div>\n</dl>\n</div>\n"
    );
    assert_eq!(
        block(&html, "s-2"),
        "id=\"s-2\">\n<div class=\"static\">\n<h3>Models</h3>\n<div class=\"scroll\"><table>\n\
         <caption class=\"hush\">Models</caption>\n<thead><tr><th scope=\"col\">model</th>\
         <th class=\"number\" scope=\"col\">loss</th><th class=\"number\" scope=\"col\">experts</th></tr></thead>\n<tbody>\n\
         <tr><th scope=\"row\">a</th><td class=\"number\">3.25</td><td class=\"number\">8</td></tr>\n\
         <tr><th scope=\"row\">b</th><td class=\"number best\">3.00</td><td class=\"number\">–</td></tr>\n\
         </tbody>\n</table></div>\n</div>\n</div>\n</div>\n"
    );
    assert!(html.contains("<div class=\"block half\" data-kind=\"figures\" id=\"s-1\">"));
    let json = Block::from(Text::new("words")).id("now").to_json().unwrap();
    assert_eq!(json, r#"{"id":"now","half":false,"kind":"text","paragraphs":[[{"plain":"words"}]]}"#);
}

#[test]
fn a_page_fetches_nothing() {
    let html = page("word").to_html().unwrap();
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; \
                  base-uri 'none'; form-action 'none'\">";
    assert!(html.contains(policy));
    // The one address is the name of SVG.
    assert_eq!(html.matches("://").count(), 1);
    assert!(html.contains("\"http://www.w3.org/2000/svg\""));
    for word in [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "@import",
        "url(\"",
    ] {
        assert!(!html.contains(word), "{word}");
    }
    assert!(page("word").live("").to_html().unwrap().contains("form-action 'none'; connect-src 'self'\">"));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let lines = |line: Line| Lines::new("l", Axis::new("x"), Axis::new("y")).line(line);
    let cases: Vec<(Block, &str)> = vec![
        (
            Heat::new("h", ["a"], ["b", "c"]).values([1.0]).into(),
            "section s: block s-1 (heat): values of 1 rows and 2 columns: expected 2, found 1",
        ),
        (
            Heat::new("h", ["a"], ["b"]).values([1.0]).scale(Scale::diverging(0.0, 2.0, 1.0)).into(),
            "section s: block s-1 (heat): the scale does not ascend between finite ends: Diverging",
        ),
        (
            Heat::new("h", ["a"], ["b"]).values([1.0]).scale(Scale::sequential(f64::NAN, 1.0)).into(),
            "section s: block s-1 (heat): the scale does not ascend between finite ends: Sequential",
        ),
        (
            Bars::new("b", ["a"]).series("one", [1.0, 2.0]).into(),
            "section s: block s-1 (bars): values of \"one\": expected 1, found 2",
        ),
        (
            Bars::new("b", ["a"]).series("one", [1.0]).interval([0.5], []).into(),
            "section s: block s-1 (bars): upper ends of \"one\": expected 1, found 0",
        ),
        (
            lines(Line::new("one", [1.0, 2.0], [1.0])).into(),
            "section s: block s-1 (lines): points of \"one\": expected 2, found 1",
        ),
        (
            lines(Line::new("one", [1.0], [1.0]).band([], [1.0])).into(),
            "section s: block s-1 (lines): lower edge of \"one\": expected 1, found 0",
        ),
        (
            lines(Line::new("one", [1.0; 2000], [1.0; 2000]).band([1.0; 3000], [1.0; 3000])).into(),
            "section s: block s-1 (lines): lower edge of \"one\": expected 2000, found 3000",
        ),
        (
            Table::new("t", [Column::text("a")]).row(["x".into(), "y".into()]).into(),
            "section s: block s-1 (table): cells of row 0: expected 1, found 2",
        ),
        (
            Tokens::new("t", "expert", ["a", "b"], 1).layer(TokenLayer::new("0", [1], [])).into(),
            "section s: block s-1 (tokens): categories of layer \"0\": expected 2, found 1",
        ),
        (
            Tokens::new("t", "expert", ["a"], 0).into(),
            "section s: block s-1 (tokens): expected at least one slot for each token, found 0",
        ),
        (
            Selector::new("Layer").variant("0", Text::new("x")).chosen(1).into(),
            "section s: block s-1 (selector): variant 1 is to be shown, there are 1",
        ),
        (
            Details::new("d").block(Block::from(Text::new("x")).id("s")).into(),
            "section s: block s-1 (details), block s (text): the identifier \"s\" is taken",
        ),
        (Block::from(Text::new("x")).id("1 2"), "section s: block 1 2 (text): expected an identifier"),
        (
            Block::from(Text::new("x")).id("senmon-data"),
            "section s: block senmon-data (text): identifiers that begin with \"senmon-\" are reserved",
        ),
    ];
    for (block, message) in cases {
        let error = Page::new("p").section(Section::new("s", "S").block(block)).to_html().unwrap_err();
        assert!(matches!(error, PageError::Invalid { .. }));
        assert!(error.to_string().starts_with(message), "{error}\nis not\n{message}");
    }
    assert!(Block::from(Text::new("x")).to_json().is_err());
}

#[test]
fn empty_blocks_are_written() {
    let axis = || Axis::new("");
    let page = Page::new("").section(
        Section::new("s", "")
            .block(Text::default())
            .block(Figures::default())
            .block(Verdict::default())
            .block(Table::default())
            .block(Bars::default())
            .block(Lines::new("", axis(), axis()).line(Line::default()))
            .block(Heat::default())
            .block(Heat::new("", ["a"; 3], [""; 0]))
            .block(Tokens::new("", "", [""; 0], 1))
            .block(Details::default())
            .block(Selector::default()),
    );
    page.to_html().unwrap();
}

#[test]
fn long_lines_are_thinned_out_together_on_the_page_but_not_in_its_json() {
    let x = || (0..50_000).map(f64::from);
    let lines = Lines::new("l", Axis::new("x"), Axis::new("y"))
        .line(Line::new("a", x(), x().map(|x| (x / 50.0).sin())).band(x(), x()))
        .line(Line::new("b", x(), x().map(|x| (x / 70.0).cos())));
    let page = Page::new("p").section(Section::new("s", "S").block(lines));
    let read: serde_json::Value = serde_json::from_str(data(&page.to_html().unwrap())).unwrap();
    let series = &read["sections"][0]["blocks"][0]["series"];
    assert_eq!(series[0]["x"], series[1]["x"]);
    for part in ["x", "y", "low", "high"] {
        assert_eq!(series[0][part].as_array().unwrap().len(), 800, "{part}");
    }
    let whole: Page = serde_json::from_str(&page.to_json().unwrap()).unwrap();
    assert_eq!(whole, page);
}
