//! Writes a page of what is seldom: nothing at all, one of a thing, missing and huge numbers, long names, text that would like to
//! be more than text. For the browser test, not for the eye:
//!
//! ```text
//! cargo run -p senmon-page --example edges -- edges.html
//! tools/.venv/bin/python tools/pages/check_page.py edges.html
//! ```

use std::fs::File;
use std::io::BufWriter;

use senmon_page::{
    Axis, Bars, Block, Cell, Column, Details, Figure, Figures, Format, Heat, Line, Lines, Page, Reference,
    Rich, Scale, Section, Selector, Table, Text, TokenLayer, Tokens, Tone, Verdict,
};

const HOSTILE: &str = "</script><img src=x onerror=\"throw 1\"> '&quot;\u{202e}\0\u{2028}${1}";
const LONG: &str =
    "a-name-without-any-place-to-break-it-that-is-longer-than-a-phone-is-wide-and-goes-on-for-a-while";

fn axis(label: &str) -> Axis {
    Axis::new(label)
}

fn lines() -> Section {
    let numbers = |count: usize| (0..count).map(|i| i as f64);
    Section::new("lines", "Lines")
        .block(Lines::new("no line", axis("x"), axis("y")))
        .block(Lines::new("a line without points", axis("x"), axis("y")).line(Line::new("empty", [], [])))
        .block(
            Block::from(Lines::new("one point", axis("x"), axis("y")).line(Line::new("one", [3.0], [5.0])))
                .half(),
        )
        .block(
            Block::from(Lines::new("level", axis("x"), axis("y")).line(Line::new(
                "a",
                [1.0, 2.0],
                [0.0, 0.0],
            )))
            .half(),
        )
        .block(Lines::new("logarithms of what has none", axis("x").log(), axis("y").log()).line(Line::new(
            "a",
            numbers(40),
            numbers(40).map(|x| x - 5.0),
        )))
        .block(Lines::new("within less than a decade", axis("x").log(), axis("y").log()).line(Line::new(
            "a",
            numbers(40).map(|x| 41.0 + 0.1 * x),
            numbers(40).map(|x| 7.0 + 0.001 * x),
        )))
        .block(
            Lines::new("gaps, huge numbers, references that meet", axis(LONG), axis(HOSTILE))
                .line(
                    Line::new(HOSTILE, [0.0, 1e300, 2e300, 3e300], [1e-300, f64::NAN, 1e300, f64::INFINITY])
                        .band([f64::NAN; 4], [1.0; 4]),
                )
                .line(Line::new(LONG, numbers(4), numbers(4)))
                .reference(Reference::new("first", 0.0))
                .reference(Reference::new("second", 1e290))
                .reference(Reference::new("third", 1e300)),
        )
        .block((0..10).fold(Lines::new("more lines than colours", axis("x"), axis("y")), |lines, line| {
            let shift = f64::from(line);
            lines.line(Line::new(
                format!("line {line}"),
                numbers(30),
                numbers(30).map(|x| (x / 4.0 + shift).sin() + shift),
            ))
        }))
}

fn bars() -> Section {
    Section::new("bars", "Bars")
        .block(Bars::new("no bar", [""; 0]))
        .block(Bars::new("no series", ["a"]).vertical())
        .block(Bars::new("nothing but zero", ["a", "b"]).series("s", [0.0, 0.0]))
        .block(
            Bars::new("missing and negative", ["a", LONG, HOSTILE])
                .series("s", [f64::NAN, -1e9, 1e12])
                .interval([-1.0, -2e9, f64::NAN], [1.0, 1e9, 1e12])
                .reference(Reference::new(LONG, 1e12)),
        )
        .block(
            Bars::new("long names upwards", (0..30).map(|i| format!("{LONG} {i}")))
                .axes("name", "value")
                .series("one", (0..30).map(|i| f64::from(i) - 12.0))
                .series("two", (0..30).map(|i| f64::from(i).sin()))
                .vertical(),
        )
}

fn maps() -> Section {
    let names = |count: usize, name: &str| (0..count).map(|i| format!("{name} {i}")).collect::<Vec<_>>();
    Section::new("maps", "Maps")
        .block(Heat::new("no cell", [""; 0], [""; 0]))
        .block(Heat::new("no column", ["a", "b"], [""; 0]))
        .block(Heat::new("one cell", ["a"], ["b"]).values([1.0]))
        .block(Heat::new("nothing but missing", ["a", "b"], ["c"]).values([f64::NAN, f64::INFINITY]))
        .block(
            Heat::new(HOSTILE, [HOSTILE, LONG], ["x", LONG])
                .axes(HOSTILE, LONG, HOSTILE)
                .values([1e300, -1e300, 0.0, f64::NAN])
                .scale(Scale::diverging(-1.0, 0.0, 1.0)),
        )
        .block(
            Heat::new("names on both sides", names(90, "a row named"), names(70, "a column named"))
                .values((0..6300).map(|i| f64::from(i % 97))),
        )
        .block(Heat::new("a tall one", names(400, "row"), ["one", "two"]).values((0..800).map(f64::from)))
}

fn words() -> Section {
    let paragraph = Rich::new().text(HOSTILE).strong(LONG).code(HOSTILE).link(HOSTILE, "words");
    let tokens = Tokens::new(HOSTILE, HOSTILE, [HOSTILE, "", "\n", "\t", "   ", LONG, "é", "👩‍👩‍👧"], 2)
        .layer(TokenLayer::new(HOSTILE, [0, 1, -1, -1, 900, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], []))
        .layer(TokenLayer::new("2", [-1; 16], [0.5; 16]));
    let table =
        Table::new(HOSTILE, [Column::text(LONG), Column::number(HOSTILE, Format::fixed(2).unit(LONG))])
            .note(HOSTILE)
            .row([HOSTILE.into(), 1e300.into()])
            .row([LONG.into(), HOSTILE.into()])
            .row([Cell::Missing, Cell::Number(f64::INFINITY)]);
    let numbers = [
        0.0, -0.0, 0.5, 1.5, 2.5, 0.125, 1.005, 1e-5, 999.5, 999_499.9, 999_500.0, 1e15, 1e21, -1234.5678,
        1e300,
    ];
    let formats = [
        Format::auto(),
        Format::integer(),
        Format::fixed(2).signed(),
        Format::percent(1),
        Format::compact(),
        Format::times(2),
    ];
    let columns = ["auto", "integer", "signed", "percent", "compact", "times"];
    let columns = columns.iter().zip(&formats).map(|(name, format)| Column::number(*name, format.clone()));
    let formats =
        Table::new("every format", [Column::text("number")].into_iter().chain(columns)).rows(numbers.map(
            |number: f64| [Cell::from(format!("{number:e}"))].into_iter().chain([number; 6].map(Cell::from)),
        ));
    Section::new("words", HOSTILE)
        .intro(paragraph.clone())
        .block(Text::new(paragraph.clone()))
        .block(Figures::new([
            Figure::new(LONG, f64::NAN).chance(f64::INFINITY),
            Figure::new(HOSTILE, -123_456.125).format(Format::fixed(3).unit(HOSTILE)),
        ]))
        .block(Verdict::new(Tone::Bad, HOSTILE, paragraph).note(LONG))
        .block(Table::new("no row", [Column::text("a")]))
        .block(table)
        .block(formats)
        .block(Tokens::new("no token", "expert", [""; 0], 1))
        .block(Tokens::new("no layer", "expert", ["a", " b"], 1))
        .block(tokens)
        .block(Details::new(HOSTILE).block(Details::new(LONG).block(Text::new("within"))))
        .block(
            Selector::new(HOSTILE)
                .variant(
                    HOSTILE,
                    Selector::new("inner").variant("a", Text::new("a")).variant("b", Text::new("b")),
                )
                .variant(LONG, Details::new("folded").block(Heat::new("m", ["a"], ["b"]).values([1.0]))),
        )
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: edges FILE.html")?;
    let page = Page::new(HOSTILE)
        .subtitle(LONG)
        .fact(LONG, LONG)
        .fact(HOSTILE, HOSTILE)
        .section(words())
        .section(lines())
        .section(bars())
        .section(maps())
        .footer(HOSTILE);
    page.write(BufWriter::new(File::create(path)?))?;
    Ok(())
}
