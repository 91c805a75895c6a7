//! The live view of a training run: a page on loopback that shows loss, speed, the load of every expert and alarms as
//! they come.
//!
//! A [`Dashboard`] is an [`Observer`]: what it is told it keeps, thinned out ([`series`]) so that a
//! long run takes no more memory than a short one. The page is made from that by a thread of its own, when a browser asks,
//! and at most once a second for all browsers together (once more when the run begins or ends). What has changed is then
//! sent to each as server-sent events. A browser may come before the run begins, go, and come back: it finds the whole run
//! so far.
//!
//! ```no_run
//! use senmon_dashboard::{Address, Dashboard, Run};
//! use senmon_train::observer::Observers;
//!
//! let address: Address = "8080".parse()?;
//! let run = Run { name: "runs/a".into(), facts: vec![("router".into(), "topk_pre".into())], layers: vec![(0, 8)] };
//! let mut dashboard = Dashboard::open(address.bind()?, "runs/a")?;
//! println!("{}", dashboard.url());
//! // Data and model are made ready.
//! dashboard.prepared(run);
//! let mut observers = Observers::new();
//! observers.push(&mut dashboard);
//! // trainer.run(&mut observers, &interrupted)
//! # Ok::<(), senmon_dashboard::DashboardError>(())
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod address;
mod blocks;
mod error;
pub mod series;
mod server;
mod view;

use std::net::TcpListener;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub use address::Address;
pub use error::{DashboardError, Result};
use senmon_train::alarms::Alarm;
use senmon_train::jsonl::{self, Line};
use senmon_train::observer::{EvalRecord, Observer, RunInfo, StepRecord, Summary};
use server::Server;
use view::View;

/// What is known of a run before it starts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// What it is called: its folder.
    pub name: String,
    /// Names and values that stand below the title.
    pub facts: Vec<(String, String)>,
    /// Its MoE layers: the place in the model, from 0, and how many experts.
    pub layers: Vec<(usize, usize)>,
}

/// A live view that is being served. Dropped, it gives browsers two seconds at most to take the last state.
pub struct Dashboard {
    view: Arc<Mutex<View>>,
    server: Server,
}

impl Dashboard {
    /// Serves the page of run `name` to who asks at `listener`, which [`Address::bind`] gives. Up to
    /// [`prepared`](Self::prepared) it says that the run is being made ready.
    ///
    /// # Errors
    ///
    /// [`DashboardError::Exposed`] where others than this machine could ask; [`DashboardError::Start`].
    pub fn open(listener: TcpListener, name: impl Into<String>) -> Result<Self> {
        let view = Arc::new(Mutex::new(View::new(Run { name: name.into(), ..Run::default() })));
        Ok(Self { server: Server::open(listener, Arc::clone(&view))?, view })
    }

    /// The run is ready, and this is what it is like.
    pub fn prepared(&mut self, run: Run) {
        self.reshape(|view| *view = View::new(run));
    }

    /// Where the page is.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// Takes in what a run told before this process, from its `metrics.jsonl`; no more of it where `cancelled`.
    ///
    /// # Errors
    ///
    /// Those of [`jsonl::each`]; what was read up to there is kept.
    pub fn remember(&mut self, metrics: &Path, cancelled: &dyn Fn() -> bool) -> senmon_train::Result<()> {
        let read = jsonl::each(metrics, |line| {
            // A line at a time: browsers are answered meanwhile.
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            match line {
                Line::Step(record) => view.step(&record),
                Line::Eval(record) => view.evaluated(&record),
                Line::Alarm { alarm, .. } => view.alarm(&alarm),
            }
            if cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        self.server.changed();
        read
    }

    /// The run ended by an error: `message` says what.
    pub fn failed(&mut self, message: &str) {
        self.change(|view| view.failed(message));
    }

    fn change(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        self.server.changed();
    }

    /// A change after which the page has other parts.
    fn reshape(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        self.server.changed_shape();
    }
}

impl Observer for Dashboard {
    fn started(&mut self, info: &RunInfo) -> senmon_train::Result<()> {
        self.reshape(|view| view.started(info));
        Ok(())
    }

    fn step(&mut self, record: &StepRecord) -> senmon_train::Result<()> {
        self.change(|view| view.step(record));
        Ok(())
    }

    fn evaluated(&mut self, record: &EvalRecord) -> senmon_train::Result<()> {
        self.change(|view| view.evaluated(record));
        Ok(())
    }

    fn alarm(&mut self, alarm: &Alarm) -> senmon_train::Result<()> {
        self.change(|view| view.alarm(alarm));
        Ok(())
    }

    fn saved(&mut self, step: u64, _path: &Path) -> senmon_train::Result<()> {
        self.change(|view| view.saved = Some(step));
        Ok(())
    }

    fn finished(&mut self, summary: &Summary) -> senmon_train::Result<()> {
        self.change(|view| view.finished(summary));
        Ok(())
    }
}
