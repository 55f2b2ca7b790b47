//! The program `loopengine`: everything is in the library, see `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    loopengine::cli::main()
}
