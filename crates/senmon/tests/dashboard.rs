//! `train --dashboard` from outside: where it is served, and what is refused before anything is made.

#![allow(clippy::unwrap_used)]

mod common;

use common::{BATCH, MODEL, Place, refused, running};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

#[test]
fn a_run_is_seen_while_it_goes() {
    let place = Place::new();
    let command = place.senmon(&format!(
        "train --data text --out run --dashboard 0 {MODEL} {BATCH} --steps 100000 --threads 1"
    ));
    let (run, mut said) = running(command);
    let line = said.find(|line| line.starts_with("live view: ")).unwrap();
    let at = line.strip_prefix("live view: http://").unwrap().to_owned();
    assert!(at.starts_with("127.0.0.1:"), "{line}");
    // It is there before the run is; the first step is told on standard error.
    said.find(|line| line.contains("step 1 ")).unwrap();
    let mut stream = TcpStream::connect(&at).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    drop(run);
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("Load of every expert"), "{page:.300}");
    assert!(page.contains("topk_pre") && page.contains("1 of 4 experts"));
}

#[test]
fn an_address_that_cannot_be_had() {
    let place = Place::new();
    let train = |address: &str| place.train(&format!("--data text --out run --dashboard {address}"));
    refused(train("0.0.0.0:0"), &["--dashboard", "this machine alone", "ssh -L"]);
    refused(train("somewhere"), &["--dashboard", "PORT", "somewhere"]);
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = held.local_addr().unwrap().to_string();
    refused(train(&taken), &["--dashboard", &taken, "another port"]);
    assert!(!place.path("run").exists());
}
