//! A page: its head, its sections and their blocks, and how it is written.

use std::collections::HashSet;
use std::io;

use serde::{Deserialize, Serialize};

use crate::embed::{json, number};
use crate::error::{PageError, Result, invalid};
use crate::format::Format;
use crate::html::{push_page, push_text};
use crate::{Bars, Details, Figures, Heat, Lines, Rich, Selector, Table, Text, Tokens, Verdict};

/// A page in one file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// What the page is about; the name of its window, too.
    pub title: String,
    /// A sentence below the title; may be empty.
    #[serde(default)]
    pub subtitle: String,
    /// What was looked at: names and values, shown below the title.
    #[serde(default)]
    pub facts: Vec<(String, String)>,
    /// The sections, from top to bottom.
    #[serde(default)]
    pub sections: Vec<Section>,
    /// Where the page comes from, at its end.
    #[serde(default)]
    pub footer: Rich,
    /// The address, on the server that the page came from, of events that keep it up to date. With one, even an empty one,
    /// the page's script may talk to that server; otherwise it may talk to nothing.
    #[serde(default)]
    pub live: Option<String>,
}

/// A part of a page under a heading.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// Its name in links: a letter, then letters, digits, `-`, `_` and `.`. Names of sections and blocks differ.
    pub id: String,
    /// The heading.
    pub heading: String,
    /// Paragraphs before the blocks.
    #[serde(default)]
    pub intro: Vec<Rich>,
    /// What is shown.
    #[serde(default)]
    pub blocks: Vec<Block>,
}

/// A thing on a page. Every kind of content is turned into one by `into`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// Its name in links and for updates, as that of a section. Where it is empty, a page that is written gives it one:
    /// that of what it stands in, a dash and its place.
    #[serde(default)]
    pub id: String,
    /// Whether it takes half of the width where there is room, so that two stand side by side.
    #[serde(default)]
    pub half: bool,
    /// What it shows.
    #[serde(flatten)]
    pub content: Content,
}

/// What a block shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Content {
    /// Paragraphs.
    Text(Text),
    /// Large numbers.
    Figures(Figures),
    /// A sentence in a box.
    Verdict(Verdict),
    /// A table.
    Table(Table),
    /// Bars.
    Bars(Bars),
    /// Lines over an axis.
    Lines(Lines),
    /// A heat map.
    Heat(Heat),
    /// Text coloured by category.
    Tokens(Tokens),
    /// Blocks that are folded away.
    Details(Details),
    /// Variants of which one is shown.
    Selector(Selector),
}

/// A value that others are held against, such as that of chance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// What it is.
    pub label: String,
    /// Its value, in the unit of what it is held against. One that is not finite is not drawn.
    #[serde(with = "number")]
    pub value: f64,
}

impl Reference {
    /// A value with a name.
    pub fn new(label: impl Into<String>, value: f64) -> Self {
        Self { label: label.into(), value }
    }

    /// The value that chance would give.
    pub fn chance(value: f64) -> Self {
        Self::new("chance", value)
    }

    /// Its name and value.
    pub(crate) fn text(&self, format: &Format) -> String {
        format!("{} {}", self.label, format.text(self.value))
    }
}

/// What every kind of content can do.
pub(crate) trait Show {
    /// Fills in what is shown but was not said, and thins out what is too much to draw.
    fn prepare(&mut self) {}

    /// Refuses contradictions. `at` says where the content stands.
    fn check(&self, at: &str) -> Result<()>;

    /// The content without scripts.
    fn push_static(&self, out: &mut String);
}

impl Content {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Figures(_) => "figures",
            Self::Verdict(_) => "verdict",
            Self::Table(_) => "table",
            Self::Bars(_) => "bars",
            Self::Lines(_) => "lines",
            Self::Heat(_) => "heat",
            Self::Tokens(_) => "tokens",
            Self::Details(_) => "details",
            Self::Selector(_) => "selector",
        }
    }

    fn show(&self) -> &dyn Show {
        match self {
            Self::Text(it) => it,
            Self::Figures(it) => it,
            Self::Verdict(it) => it,
            Self::Table(it) => it,
            Self::Bars(it) => it,
            Self::Lines(it) => it,
            Self::Heat(it) => it,
            Self::Tokens(it) => it,
            Self::Details(it) => it,
            Self::Selector(it) => it,
        }
    }

    fn show_mut(&mut self) -> &mut dyn Show {
        match self {
            Self::Text(it) => it,
            Self::Figures(it) => it,
            Self::Verdict(it) => it,
            Self::Table(it) => it,
            Self::Bars(it) => it,
            Self::Lines(it) => it,
            Self::Heat(it) => it,
            Self::Tokens(it) => it,
            Self::Details(it) => it,
            Self::Selector(it) => it,
        }
    }

    fn children_mut(&mut self) -> Vec<&mut Vec<Block>> {
        match self {
            Self::Details(it) => vec![&mut it.blocks],
            Self::Selector(it) => it.variants.iter_mut().map(|variant| &mut variant.blocks).collect(),
            _ => Vec::new(),
        }
    }

    fn children(&self) -> Vec<&[Block]> {
        match self {
            Self::Details(it) => vec![it.blocks.as_slice()],
            Self::Selector(it) => it.variants.iter().map(|variant| variant.blocks.as_slice()).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether the script draws it, so that what stands in the page is only for those without one.
    pub(crate) fn is_drawn(&self) -> bool {
        matches!(self, Self::Table(_) | Self::Bars(_) | Self::Lines(_) | Self::Heat(_) | Self::Tokens(_))
    }
}

macro_rules! into_block {
    ($($kind:ident),*) => {$(
        impl From<$kind> for Block {
            fn from(content: $kind) -> Self {
                Self { id: String::new(), half: false, content: Content::$kind(content) }
            }
        }
    )*};
}
into_block!(Text, Figures, Verdict, Table, Bars, Lines, Heat, Tokens, Details, Selector);

impl Block {
    /// With a name, for links and updates.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// In half of the width, where there is room.
    #[must_use]
    pub fn half(mut self) -> Self {
        self.half = true;
        self
    }

    /// The block as `senmon.update` of the page's script takes it.
    ///
    /// # Errors
    ///
    /// [`PageError::Invalid`] where the block has no identifier or contradicts itself.
    pub fn to_json(&self) -> Result<String> {
        let mut block = self.clone();
        block.prepare("");
        block.check(&format!("block {}", self.id), &mut HashSet::new())?;
        json(&block)
    }

    fn prepare(&mut self, id: &str) {
        if self.id.is_empty() {
            id.clone_into(&mut self.id);
        }
        let own = self.id.clone();
        let mut place = 0;
        for blocks in self.content.children_mut() {
            for block in blocks {
                place += 1;
                block.prepare(&format!("{own}-{place}"));
            }
        }
        self.content.show_mut().prepare();
    }

    fn check<'a>(&'a self, at: &str, seen: &mut HashSet<&'a str>) -> Result<()> {
        let at = format!("{at} ({})", self.content.kind());
        check_id(&at, &self.id, seen)?;
        self.content.show().check(&at)?;
        for block in self.content.children().into_iter().flatten() {
            block.check(&format!("{at}, block {}", block.id), seen)?;
        }
        Ok(())
    }

    /// The element that the script draws into, with what is there without scripts.
    pub(crate) fn push_html(&self, out: &mut String) {
        let half = if self.half { " half" } else { "" };
        out.push_str(&format!("<div class=\"block{half}\" data-kind=\"{}\" id=\"", self.content.kind()));
        push_text(out, &self.id);
        out.push_str("\">\n");
        if self.content.is_drawn() {
            out.push_str("<div class=\"static\">\n");
        }
        self.content.show().push_static(out);
        out.push_str(if self.content.is_drawn() { "</div>\n</div>\n" } else { "</div>\n" });
    }
}

impl Section {
    /// A section without content. `id` is its name in links.
    pub fn new(id: impl Into<String>, heading: impl Into<String>) -> Self {
        Self { id: id.into(), heading: heading.into(), ..Self::default() }
    }

    /// Adds a paragraph before the blocks.
    #[must_use]
    pub fn intro(mut self, paragraph: impl Into<Rich>) -> Self {
        self.intro.push(paragraph.into());
        self
    }

    /// Adds a block.
    #[must_use]
    pub fn block(mut self, block: impl Into<Block>) -> Self {
        self.blocks.push(block.into());
        self
    }
}

impl Page {
    /// A page without content.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), ..Self::default() }
    }

    /// With a sentence below the title.
    #[must_use]
    pub fn subtitle(mut self, subtitle: impl Into<String>) -> Self {
        self.subtitle = subtitle.into();
        self
    }

    /// Adds a name and its value below the title.
    #[must_use]
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.push((name.into(), value.into()));
        self
    }

    /// Adds a section.
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// With a line at the end: where the page comes from.
    #[must_use]
    pub fn footer(mut self, footer: impl Into<Rich>) -> Self {
        self.footer = footer.into();
        self
    }

    /// Keeps the page up to date by server-sent events from the address `events` of the server that it came from. The data
    /// of an event are a block as [`Block::to_json`] writes it, or an array of such; an event named `reload` loads the page
    /// again. Where the address is empty, the page listens to none, but another script on it may talk to the server.
    #[must_use]
    pub fn live(mut self, events: impl Into<String>) -> Self {
        self.live = Some(events.into());
        self
    }

    /// The page as HTML.
    ///
    /// # Errors
    ///
    /// [`PageError::Invalid`] where a block contradicts itself or two have one identifier.
    pub fn to_html(&self) -> Result<String> {
        let page = self.prepared()?;
        Ok(push_page(&page, &json(&page)?))
    }

    /// Writes the page as HTML.
    ///
    /// # Errors
    ///
    /// Those of [`Page::to_html`], and [`PageError::Io`].
    pub fn write(&self, mut to: impl io::Write) -> Result<()> {
        to.write_all(self.to_html()?.as_bytes())?;
        to.flush().map_err(PageError::Io)
    }

    /// The page as JSON with every digit and every point; `serde_json::from_str` reads it back. Numbers that are not
    /// finite become null, and are NaN when read.
    ///
    /// # Errors
    ///
    /// [`PageError::Json`].
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// The page with every identifier and summary, thinned out, and found to be sound.
    fn prepared(&self) -> Result<Self> {
        let mut page = self.clone();
        for section in &mut page.sections {
            let id = section.id.clone();
            for (place, block) in section.blocks.iter_mut().enumerate() {
                block.prepare(&format!("{id}-{}", place + 1));
            }
        }
        let mut seen = HashSet::new();
        for section in &page.sections {
            let at = format!("section {}", section.id);
            check_id(&at, &section.id, &mut seen)?;
            for block in &section.blocks {
                block.check(&format!("{at}: block {}", block.id), &mut seen)?;
            }
        }
        Ok(page)
    }
}

/// Identifiers stand in attributes, links and selectors; those that begin with `senmon-` are the page's own.
fn check_id<'a>(at: &str, id: &'a str, seen: &mut HashSet<&'a str>) -> Result<()> {
    let sound = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !sound {
        let what = "expected an identifier (a letter, then letters, digits, '-', '_' and '.'), found";
        return Err(invalid(at, format!("{what} {id:?}")));
    }
    if id.starts_with("senmon-") {
        return Err(invalid(
            at,
            format!("identifiers that begin with \"senmon-\" are reserved, found {id:?}"),
        ));
    }
    if !seen.insert(id) {
        return Err(invalid(at, format!("the identifier {id:?} is taken by another section or block")));
    }
    Ok(())
}
