//! How a command fails: one line, and 2 where the user can put it right, 130 where the user ended it, 1 otherwise.

use senmon_compare::CompareError;
use senmon_dashboard::DashboardError;
use senmon_data::DataError;
use senmon_hub::HubError;
use senmon_insight::InsightError;
use senmon_models::ModelError;
use senmon_moe::MoeError;
use senmon_train::TrainError;

/// What a shell reports of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// Something that the user can put right.
    pub fn mistake(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 2 }
    }

    /// Anything else.
    pub fn other(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }

    /// The user ended it.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: INTERRUPTED }
    }

    /// The user ended it: no error.
    pub fn is_interruption(&self) -> bool {
        self.code == INTERRUPTED
    }

    /// The exit status.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let lines = self.message.lines().map(str::trim).filter(|line| !line.is_empty());
        // With RUST_BACKTRACE set, errors of the tensor library carry where they arose.
        let mut lines = lines.take_while(|line| !line.starts_with("0: "));
        f.write_str(lines.next().unwrap_or("unknown error"))?;
        lines.try_for_each(|line| write!(f, "; {line}"))
    }
}

/// The exit status that an error asks for.
trait Blame: std::fmt::Display {
    fn code(&self) -> u8;
}

/// The user can put it right, or not.
fn users(mistake: bool) -> u8 {
    if mistake { 2 } else { 1 }
}

impl Blame for DataError {
    fn code(&self) -> u8 {
        match self {
            DataError::Cancelled => INTERRUPTED,
            e => users(e.is_users_mistake()),
        }
    }
}
impl Blame for CompareError {
    fn code(&self) -> u8 {
        match self {
            e if e.is_interruption() => INTERRUPTED,
            e => users(e.is_users_mistake()),
        }
    }
}
impl Blame for DashboardError {
    fn code(&self) -> u8 {
        users(self.is_users_mistake())
    }
}
impl Blame for HubError {
    fn code(&self) -> u8 {
        users(self.is_users_mistake())
    }
}
impl Blame for ModelError {
    fn code(&self) -> u8 {
        users(self.is_users_mistake())
    }
}
impl Blame for TrainError {
    fn code(&self) -> u8 {
        match self {
            TrainError::Data(e) => e.code(),
            e => users(e.is_users_mistake()),
        }
    }
}
impl Blame for InsightError {
    fn code(&self) -> u8 {
        users(self.is_users_mistake())
    }
}
impl Blame for MoeError {
    fn code(&self) -> u8 {
        users(!matches!(self, MoeError::Candle(_)))
    }
}
impl Blame for candle_core::Error {
    fn code(&self) -> u8 {
        1
    }
}

impl<E: Blame> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: error.code(), message: error.to_string() }
    }
}

/// What a command returns.
pub type Result<T> = std::result::Result<T, Failure>;
