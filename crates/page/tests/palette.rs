//! The colours of `page.css`: text can be read, lines can be told apart, scales ascend; in both themes, and for readers with the
//! usual deficiencies of colour vision.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

type Rgb = [f64; 3];

const CSS: &str = include_str!("../src/page.css");

/// Every `--name: light-dark(#..., #...)`, as linear RGB, in one theme.
fn colours(dark: bool) -> HashMap<&'static str, Rgb> {
    let mut all = HashMap::new();
    for line in CSS.lines() {
        let Some((name, pair)) =
            line.trim().strip_prefix("--").and_then(|line| line.split_once(": light-dark("))
        else {
            continue;
        };
        let mut hex = pair.split('#').skip(1).map(|part| &part[..6]);
        let light = hex.next().unwrap();
        let hex = if dark { hex.next().unwrap() } else { light };
        let part = |at: usize| linear(f64::from(u8::from_str_radix(&hex[at..at + 2], 16).unwrap()) / 255.0);
        all.insert(name, [part(0), part(2), part(4)]);
    }
    assert!(all.len() > 25, "the colours are written in another way");
    all
}

fn linear(c: f64) -> f64 {
    if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
}

fn encoded(c: f64) -> f64 {
    if c <= 0.0031308 { c * 12.92 } else { 1.055 * c.powf(1.0 / 2.4) - 0.055 }
}

fn luminance(c: Rgb) -> f64 {
    0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]
}

/// The contrast of WCAG 2.
fn contrast(a: Rgb, b: Rgb) -> f64 {
    let (a, b) = (luminance(a), luminance(b));
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

fn times(matrix: [[f64; 3]; 3], c: Rgb) -> Rgb {
    matrix.map(|row| row.iter().zip(c).map(|(m, c)| m * c).sum())
}

/// Oklab (Ottosson, 2020), in which distances are about as they are seen.
fn oklab(c: Rgb) -> Rgb {
    const CONES: [[f64; 3]; 3] = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ];
    const AXES: [[f64; 3]; 3] = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ];
    times(AXES, times(CONES, c.map(|c| c.clamp(0.0, 1.0))).map(f64::cbrt))
}

fn distance(a: Rgb, b: Rgb) -> f64 {
    let (a, b) = (oklab(a), oklab(b));
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

/// Full protanopia, deuteranopia and tritanopia (Machado, Oliveira and Fernandes, 2009), and none.
const EYES: [(&str, [[f64; 3]; 3]); 4] = [
    ("all cones", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    (
        "protanopia",
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ),
    (
        "deuteranopia",
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ),
    (
        "tritanopia",
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ),
];

/// `color-mix(in srgb, colour SHARE, paper)`.
fn tint(colour: Rgb, paper: Rgb, share: f64) -> Rgb {
    let mut out = [0.0; 3];
    for (out, (c, p)) in out.iter_mut().zip(colour.iter().zip(paper)) {
        *out = linear(encoded(*c) * share + encoded(p) * (1.0 - share));
    }
    out
}

const SERIES: [&str; 8] = ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"];

#[test]
fn text_has_the_contrast_of_wcag_aa() {
    for dark in [false, true] {
        let of = colours(dark);
        for (text, ground) in [
            ("ink", "paper"),
            ("ink", "panel"),
            ("muted", "paper"),
            ("muted", "panel"),
            ("accent", "paper"),
            ("accent", "panel"),
            ("good", "panel"),
            ("bad", "panel"),
            ("unclear", "panel"),
        ] {
            let found = contrast(of[text], of[ground]);
            assert!(found >= 4.5, "{text} on {ground}, dark {dark}: {found:.2}");
        }
        for name in SERIES {
            assert!(CSS.contains("color-mix(in srgb, var(--c) 24%, var(--paper))"));
            let found = contrast(of["ink"], tint(of[name], of["paper"], 0.24));
            assert!(found >= 4.5, "tokens on the tint of {name}, dark {dark}: {found:.2}");
        }
    }
}

#[test]
fn lines_and_outlines_have_the_contrast_of_wcag_aa() {
    for dark in [false, true] {
        let of = colours(dark);
        for name in SERIES.iter().chain(&["edge", "accent"]) {
            let found = contrast(of[name], of["paper"]);
            assert!(found >= 3.0, "{name} on paper, dark {dark}: {found:.2}");
        }
    }
}

#[test]
fn series_are_told_apart_by_every_kind_of_eyes() {
    for dark in [false, true] {
        let of = colours(dark);
        for (eyes, matrix) in EYES {
            for (place, a) in SERIES.iter().enumerate() {
                for b in &SERIES[..place] {
                    let found = distance(times(matrix, of[a]), times(matrix, of[b]));
                    assert!(found >= 0.08, "{a} and {b}, {eyes}, dark {dark}: {found:.3}");
                }
            }
        }
    }
}

#[test]
fn scales_go_one_way() {
    for dark in [false, true] {
        let of = colours(dark);
        let away = |names: &[&str]| {
            let steps: Vec<f64> = names.iter().map(|name| contrast(of[name], of["paper"])).collect();
            assert!(steps.is_sorted_by(|a, b| b / a > 1.3), "{names:?}, dark {dark}: {steps:?}");
        };
        away(&["seq0", "seq1", "seq2", "seq3", "seq4"]);
        away(&["div2", "div1", "div0"]);
        away(&["div2", "div3", "div4"]);
        for (eyes, matrix) in EYES {
            for (below, above) in [("div0", "div4"), ("div1", "div3")] {
                let found = distance(times(matrix, of[below]), times(matrix, of[above]));
                assert!(found >= 0.1, "{below} and {above}, {eyes}, dark {dark}: {found:.3}");
            }
        }
    }
}
