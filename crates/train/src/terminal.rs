//! Progress for people.
