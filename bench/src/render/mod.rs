//! Ways to write a result down.
