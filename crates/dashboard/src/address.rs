//! Where a live view is served: on loopback, and nowhere else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::str::FromStr;

use crate::error::{DashboardError, Result};

/// The port where nothing is said. If it is taken, the next free one of [`TRIED`].
const PORT: u16 = 7878;
const TRIED: u16 = 20;

/// An address on loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    at: SocketAddr,
    /// Whether the next port does as well.
    any: bool,
}

impl Default for Address {
    fn default() -> Self {
        Self { at: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT), any: true }
    }
}

impl FromStr for Address {
    type Err = DashboardError;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || DashboardError::Address(text.to_owned());
        let at = if let Ok(port) = text.parse::<u16>() {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
        } else if let Some(port) = text.strip_prefix("localhost:") {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().map_err(|_| unknown())?)
        } else {
            text.parse().map_err(|_| unknown())?
        };
        if at.ip().is_loopback() { Ok(Self { at, any: false }) } else { Err(DashboardError::Exposed(at)) }
    }
}

impl Address {
    /// Takes it, for [`Dashboard::open`](crate::Dashboard::open).
    ///
    /// # Errors
    ///
    /// [`DashboardError::Taken`] where it cannot be had.
    pub fn bind(&self) -> Result<TcpListener> {
        let mut at = self.at;
        loop {
            match TcpListener::bind(at) {
                Ok(listener) => return Ok(listener),
                Err(error) => {
                    let taken = error.kind() == std::io::ErrorKind::AddrInUse;
                    if !self.any || !taken || at.port() + 1 >= PORT + TRIED {
                        return Err(DashboardError::Taken { address: at, error });
                    }
                    at.set_port(at.port() + 1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback() {
        for (text, at) in [
            ("8080", "127.0.0.1:8080"),
            ("localhost:1", "127.0.0.1:1"),
            ("127.0.0.2:0", "127.0.0.2:0"),
            ("[::1]:90", "[::1]:90"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), Address { at: at.parse().unwrap(), any: false });
        }
        for text in ["0.0.0.0:80", "10.0.0.1:80", "[::]:80"] {
            assert!(matches!(text.parse::<Address>(), Err(DashboardError::Exposed(_))), "{text}");
        }
        for text in ["", "host:80", "99999", "127.0.0.1", "localhost:x", "-1"] {
            assert!(matches!(text.parse::<Address>(), Err(DashboardError::Address(_))), "{text}");
        }
    }

    #[test]
    fn a_port_that_is_taken() {
        let first = "0".parse::<Address>().unwrap().bind().unwrap();
        let same = Address { at: first.local_addr().unwrap(), any: false };
        assert!(matches!(same.bind(), Err(DashboardError::Taken { .. })));
        // Beyond the last port there is none. Should nobody have it, this test has it now.
        let last = "65535".parse::<Address>().unwrap();
        let _held = last.bind();
        assert!(matches!(last.bind(), Err(DashboardError::Taken { .. })));
        // Nobody said which, so another one will do.
        let (one, two) = (Address::default().bind().unwrap(), Address::default().bind().unwrap());
        assert_ne!(one.local_addr().unwrap(), two.local_addr().unwrap());
    }
}
