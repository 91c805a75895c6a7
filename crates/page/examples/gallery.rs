//! Writes a page with every kind of block and made-up data, to look at and for the browser test:
//!
//! ```text
//! cargo run -p senmon-page --example gallery -- gallery.html
//! tools/.venv/bin/python tools/pages/check_page.py gallery.html
//! ```

use std::fs::File;
use std::io::BufWriter;

use senmon_page::{
    Axis, Bars, Best, Block, Cell, Column, Details, Figure, Figures, Format, Heat, Line, Lines, Page,
    Reference, Rich, Scale, Section, Selector, Table, Text, TokenLayer, Tokens, Tone, Verdict,
};

const LAYERS: usize = 48;
const EXPERTS: usize = 128;
const CHOSEN: usize = 8;

/// Numbers that look random and are always the same (splitmix64).
struct Draws(u64);

impl Draws {
    /// Between 0 and 1.
    fn even(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal, with a standard deviation of 1.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.even()).sum::<f64>() - 6.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.even() * end as f64) as usize
    }
}

fn numbers(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|number| number.to_string())
}

/// Shares of experts in a layer that sum to 1, more uneven in the first and last layers; two experts get nothing.
fn shares(layer: usize, draws: &mut Draws) -> Vec<f64> {
    let depth = layer as f64 / (LAYERS - 1) as f64;
    let uneven = 0.25 + 1.1 * (2.0 * depth - 1.0).powi(4);
    let mut shares: Vec<f64> = (0..EXPERTS).map(|_| (uneven * draws.normal()).exp()).collect();
    if layer < 3 {
        shares[17] = 0.0;
        shares[90] = 0.0;
    }
    let sum: f64 = shares.iter().sum();
    shares.iter().map(|share| share / sum).collect()
}

fn load(draws: &mut Draws) -> Heat {
    let chance = 1.0 / EXPERTS as f64;
    Heat::new("Load of every expert", numbers(LAYERS), numbers(EXPERTS))
        .note("Share of all choices that went to an expert. An even router would give every expert the same.")
        .axes("layer", "expert", "share of choices")
        .values((0..LAYERS).flat_map(|layer| shares(layer, draws)))
        .scale(Scale::diverging(0.0, chance, 4.0 * chance))
        .format(Format::percent(2))
}

/// How often two experts of a layer are chosen together, over what chance would give.
fn together(seed: u64) -> Heat {
    const SIDE: usize = 64;
    let mut draws = Draws(seed);
    let group: Vec<usize> = (0..SIDE).map(|_| draws.below(6)).collect();
    let mut values = vec![0.0; SIDE * SIDE];
    for a in 0..SIDE {
        for b in 0..=a {
            let near = if group[a] == group[b] { 0.75 } else { -0.25 };
            let ratio = if a == b { f64::NAN } else { (near + 0.35 * draws.normal()).exp() };
            values[a * SIDE + b] = ratio;
            values[b * SIDE + a] = ratio;
        }
    }
    Heat::new("Experts chosen together", numbers(SIDE), numbers(SIDE))
        .axes("expert", "expert", "times as often as by chance")
        .values(values)
        .scale(Scale::diverging(0.0, 1.0, 4.0))
        .format(Format::times(2))
}

const DOMAINS: [&str; 7] =
    ["Encyclopaedia", "Program code (Python and Rust)", "Mathematics", "News", "Fiction", "Dialogue", "Law"];

fn domains(draws: &mut Draws) -> Heat {
    let experts = [3, 17, 41, 56, 72, 90, 101, 119];
    Heat::new("Domains of eight experts", DOMAINS, experts.map(|expert| format!("expert {expert}")))
        .axes("domain", "", "share of the domain's tokens")
        .values((0..DOMAINS.len() * experts.len()).map(|_| 0.001 + 0.03 * draws.even().powi(3)))
        .scale(Scale::sequential(0.0, 0.03))
        .format(Format::percent(1))
}

fn arm(name: &str, floor: f64, speed: f64, draws: &mut Draws) -> Line {
    let steps: Vec<f64> = (1..=4_000).map(|step| f64::from(step) * 5.0).collect();
    let curve = |step: f64| floor + (10.8 - floor) * (1.0 + step / speed).powf(-0.72);
    let noisy: Vec<f64> = steps.iter().map(|step| curve(*step) + 0.02 * draws.normal()).collect();
    let wide = |step: f64| 0.05 + 0.4 * (1.0 + step / speed).powf(-0.5);
    let low = steps.iter().map(|step| curve(*step) - wide(*step));
    let high = steps.iter().map(|step| curve(*step) + wide(*step));
    Line::new(name, steps.iter().copied(), noisy).band(low, high)
}

fn losses(log: bool, draws: &mut Draws) -> Lines {
    let x = Axis::new("optimiser step").format(Format::integer());
    let title = if log { "Validation loss, both axes logarithmic" } else { "Validation loss" };
    let y = Axis::new("loss, nats per token").format(Format::fixed(3));
    let (x, y) = if log { (x.log(), y.log()) } else { (x, y.range(2.8, 6.0)) };
    Lines::new(title, x, y)
        .note("Mean of three seeds; the band is from the lowest to the highest.")
        .line(arm("top-2 of 8", 2.98, 160.0, draws))
        .line(arm("top-8 of 64", 2.86, 190.0, draws))
        .line(arm("dense, equal compute", 3.12, 140.0, draws))
        .reference(Reference::new("dense, twice the compute", 3.02))
}

fn entropy(draws: &mut Draws) -> Lines {
    let layers: Vec<f64> = (0..LAYERS).map(|layer| layer as f64).collect();
    let entropy: Vec<f64> =
        layers.iter().map(|layer| 0.93 - 0.0001 * (layer - 24.0).powi(2) + 0.01 * draws.normal()).collect();
    Lines::new(
        "Entropy of the gate",
        Axis::new("layer").format(Format::integer()),
        Axis::new("share of the greatest possible").format(Format::percent(1)).range(None, 1.0),
    )
    .line(Line::new("entropy", layers, entropy).points())
    .reference(Reference::chance(1.0))
}

const PROSE: &str = "A mixture of experts has many feed-forward networks in each layer, and a small router that sends every \
token to a few of them. Most of its parameters rest while a token passes, so that a model may know much and yet be quick. \
The router learns with the rest of the model, from nothing but the loss; what its experts come to stand for is not said by \
anyone. Often it is words of one kind: numbers, the ends of sentences, names of places, the brackets of a program.\n\n\
fn choose(scores: &[f32], k: usize) -> Vec<usize> {\n    let mut order: Vec<usize> = (0..scores.len()).collect();\n    \
order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));\n    order.truncate(k);\n    order\n}\n\nIn 1991 Jacobs, Jordan, \
Nowlan and Hinton let 4 experts compete for vowels; in 2017 there were 4,096 of them between two LSTM layers, and in 2024 \
models with 256 in each of 58 layers were trained on 14.8 trillion tokens. 語彙 and Übergrößen are words as well, and \
<script>alert(\"tokens\")</script> is only text.";

/// Words with the space before them, punctuation and line ends apart, as byte-pair encodings often cut.
fn cut(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    for c in text.chars() {
        let joins = tokens.last().is_some_and(|last| {
            last.chars()
                .last()
                .is_some_and(|end| c.is_alphanumeric() && (end.is_alphanumeric() || end == ' '))
                && last.chars().count() < 8
        });
        match tokens.last_mut() {
            Some(last) if joins => last.push(c),
            _ => tokens.push(c.to_string()),
        }
    }
    tokens
}

fn tokens() -> Tokens {
    let mut text = cut(PROSE);
    text.truncate(400);
    let mut shown = Tokens::new("Which expert reads which token", "expert", text.clone(), CHOSEN)
        .note(Rich::new().text("The colour is that of the expert with the greatest weight. ").emphasis(
            "Point at a token for all of its experts; click on it to see where else its first one is chosen.",
        ))
        .chosen(1);
    for (place, layer) in [0, 7, 15, 23, 31, 39, 47].into_iter().enumerate() {
        let mut draws = Draws(77 + place as u64);
        let mut picks = Vec::new();
        let mut weights = Vec::new();
        for token in &text {
            // Experts by the kind of token, with exceptions.
            let kind = match token.trim().chars().next() {
                None => 5,
                Some(c) if c.is_numeric() => 93,
                Some(c) if c.is_uppercase() => 12,
                Some(c) if !c.is_alphanumeric() => 44,
                Some(c) => 60 + (c as i64 * (3 + place as i64)) % 13,
            };
            let first = if draws.even() < 0.15 { draws.below(EXPERTS) as i64 } else { kind };
            let mut sizes: Vec<f64> = (0..CHOSEN).map(|_| draws.even().powi(2) + 0.05).collect();
            sizes.sort_by(|a, b| b.total_cmp(a));
            let sum: f64 = sizes.iter().sum();
            picks.push(first);
            picks.extend((1..CHOSEN as i64).map(|slot| (first + 17 * slot) % EXPERTS as i64));
            weights.extend(sizes.iter().map(|size| size / sum));
        }
        shown = shown.layer(TokenLayer::new(layer.to_string(), picks, weights));
    }
    shown
}

fn models() -> Table {
    let columns = [
        Column::text("model"),
        Column::number("parameters", Format::compact()),
        Column::number("active", Format::compact()),
        Column::number("experts", Format::integer()),
        Column::number("loss", Format::fixed(3)).best(Best::Lowest),
        Column::number("against dense", Format::fixed(3).signed()),
        Column::number("tokens/s", Format::integer()).best(Best::Highest),
    ];
    let rows: [(&str, [f64; 6]); 5] = [
        ("dense-350m", [354e6, 354e6, 1.0, 3.121, 0.0, 21_450.0]),
        ("top-1 of 8", [1.21e9, 354e6, 8.0, 3.043, -0.078, 19_870.0]),
        ("top-2 of 8", [1.21e9, 505e6, 8.0, 2.987, -0.134, 16_020.0]),
        ("top-8 of 64", [1.24e9, 362e6, 64.0, 2.861, -0.260, 14_410.0]),
        (
            "=HYPERLINK(\"x\") <img src=x onerror=alert(1)>",
            [1.24e9, f64::NAN, 64.0, 3.3, 0.179, f64::INFINITY],
        ),
    ];
    Table::new("Models that were compared", columns)
        .note("The same data and the same compute for all; the best of a column is bold.")
        .rows(rows.map(|(name, values)| [Cell::from(name)].into_iter().chain(values.map(Cell::from))))
}

fn experts(draws: &mut Draws) -> Table {
    let columns = [
        Column::text("expert"),
        Column::text("most typical tokens"),
        Column::number("layer", Format::integer()),
        Column::number("share", Format::percent(2)),
        Column::number("mean weight", Format::fixed(3)),
        Column::number("times chance", Format::times(2)).best(Best::Highest),
    ];
    let kinds =
        ["\" the\", \" a\", \" an\"", "digits", "\")\", \"]\", \"}\"", "names of places", "\u{202e}abc"];
    let mut table = Table::new("Every expert of four layers", columns);
    for layer in [0, 15, 31, 47] {
        for (expert, share) in shares(layer, draws).into_iter().enumerate() {
            table.rows.push(vec![
                Cell::from(format!("{layer}.{expert}")),
                kinds.get(draws.below(9)).copied().into(),
                layer.into(),
                share.into(),
                (0.1 + 0.1 * draws.even()).into(),
                (share * EXPERTS as f64).into(),
            ]);
        }
    }
    table
}

fn specialisation(draws: &mut Draws) -> Bars {
    let mut values = || DOMAINS.map(|_| 0.08 + 0.5 * draws.even());
    let (first, last) = (values(), values());
    Bars::new("How well the experts tell the domain", DOMAINS)
        .note("Share of tokens whose domain is guessed from the experts of one layer.")
        .axes("domain", "tokens guessed")
        .series("layer 7", first)
        .interval(first.map(|value| value - 0.03), first.map(|value| value + 0.03))
        .series("layer 39", last)
        .interval(last.map(|value| value - 0.02), last.map(|value| value + 0.04))
        .format(Format::percent(1))
        .reference(Reference::chance(1.0 / DOMAINS.len() as f64))
}

fn changes(draws: &mut Draws) -> Bars {
    Bars::new("Loss when an expert is left out", ["expert 3", "expert 17", "expert 41", "expert 56"])
        .axes("expert", "change of the loss")
        .series("change", (0..4).map(|_| 0.05 * draws.normal()))
        .format(Format::fixed(3).signed())
}

fn layer_load(layer: usize, draws: &mut Draws) -> Block {
    Bars::new(format!("Load in layer {layer}"), numbers(EXPERTS))
        .axes("expert", "share of choices")
        .series("share", shares(layer, draws))
        .format(Format::percent(2))
        .reference(Reference::chance(1.0 / EXPERTS as f64))
        .vertical()
        .into()
}

fn page() -> Page {
    let mut draws = Draws(1);
    let draws = &mut draws;
    let mut by_layer = Selector::new("Layer");
    for layer in 0..LAYERS {
        by_layer = by_layer.variant(layer.to_string(), layer_load(layer, draws));
    }
    let together = Selector::new("Layer")
        .variant("7", together(7))
        .variant("23", together(23))
        .variant("39", together(39))
        .chosen(1);
    Page::new("What the router of a made-up model does")
        .subtitle("Every kind of block that a page can have, with data that no model ever produced.")
        .fact("Model", "made-up-30b-a3b, 48 layers of 128 experts, 8 chosen")
        .fact("Texts", "12,000 documents of seven domains, 9.8 million tokens")
        .fact("Routing trace", "traces/made-up.safetensors")
        .fact("Date", "2 March 2025")
        .section(
            Section::new("overview", "Overview")
                .block(
                    Verdict::new(
                        Tone::Good,
                        "It specialises",
                        Rich::new()
                            .text("The experts of the later layers follow the ")
                            .strong("domain of the text")
                            .text(
                                ": from one layer's choices it is guessed three times as often as by chance.",
                            ),
                    )
                    .note(
                        Rich::new()
                            .text("On texts that were held back; see ")
                            .link("domains", "domains")
                            .text("."),
                    ),
                )
                .block(Figures::new([
                    Figure::new("of tokens have their domain guessed", 0.431)
                        .format(Format::percent(1))
                        .chance(1.0 / 7.0),
                    Figure::new("experts never chosen", 6.0)
                        .format(Format::integer())
                        .reference(Reference::new("of", 6144.0)),
                    Figure::new("load of the busiest expert", 0.0412)
                        .format(Format::percent(2))
                        .chance(1.0 / 128.0),
                    Figure::new("tokens each second", 31_234.0).format(Format::integer()),
                ]))
                .block(
                    Text::new(
                        Rich::new()
                            .text("A paragraph may have ")
                            .strong("strong words")
                            .text(", ")
                            .emphasis("stressed ones")
                            .text(" and names such as ")
                            .code("router.kind = \"topk\"")
                            .text(
                                ". What looks like markup, such as <b>this</b> or *this*, stays what it is.",
                            ),
                    )
                    .paragraph("And there may be another paragraph."),
                ),
        )
        .section(
            Section::new("load", "Load")
                .intro("How evenly the router uses its experts.")
                .block(load(draws))
                .block(by_layer)
                .block(entropy(draws)),
        )
        .section(
            Section::new("domains", "Domains")
                .intro("Whether experts prefer kinds of text.")
                .block(Block::from(specialisation(draws)).half())
                .block(Block::from(changes(draws)).half())
                .block(domains(draws))
                .block(together),
        )
        .section(Section::new("text", "Text").block(tokens()))
        .section(
            Section::new("comparison", "Comparison")
                .block(losses(false, draws))
                .block(losses(true, draws))
                .block(models())
                .block(
                    Verdict::new(Tone::Unclear, "Not known yet", "Three seeds do not tell top-2 from top-1.")
                        .note("The difference is within the spread of seeds."),
                )
                .block(Verdict::new(Tone::Bad, "Worse", "The dense model falls behind from step 2,000 on."))
                .block(Verdict::new(Tone::Neutral, "", "A verdict may do without a label.")),
        )
        .section(
            Section::new("details", "Details").block(
                Details::new("Every expert of four layers")
                    .block(experts(draws))
                    .block(Text::new("Blocks that are folded away are drawn when they are opened.")),
            ),
        )
        .footer(Rich::new().text("Written by ").code("cargo run -p senmon-page --example gallery").text("."))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: gallery FILE.html")?;
    page().write(BufWriter::new(File::create(path)?))?;
    Ok(())
}
