//! All integration tests in one executable, so that it can be copied to a machine with a GPU and run there.
//!
//! Tests that need a GPU count as ignored where there is none.

mod bench;
#[cfg(unix)]
mod browser;
mod checkpoint;
mod convert;
mod data;
mod dist;
mod doors;
mod environment;
mod flow;
mod fuzz;
mod generate;
mod graph;
mod image_io;
mod kernels;
mod manuals;
mod models;
mod ops;
mod runs;
mod sample;
mod serve;
mod server;
mod text;
mod train;

use l2p_tests::Suite;

fn main() -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    let mut suite = Suite::default();
    bench::register(&mut suite);
    checkpoint::register(&mut suite);
    convert::register(&mut suite);
    data::register(&mut suite);
    dist::register(&mut suite);
    doors::register(&mut suite);
    environment::register(&mut suite);
    flow::register(&mut suite);
    fuzz::register(&mut suite);
    generate::register(&mut suite);
    graph::register(&mut suite);
    image_io::register(&mut suite);
    manuals::register(&mut suite);
    models::register(&mut suite);
    ops::register(&mut suite);
    runs::register(&mut suite);
    sample::register(&mut suite);
    serve::register(&mut suite);
    server::register(&mut suite);
    text::register(&mut suite);
    train::register(&mut suite);
    kernels::register(&mut suite);
    if let Err(reason) = l2p_tests::gpu() {
        eprintln!("tests that need a GPU are skipped: {reason}");
    }
    let conclusion = libtest_mimic::run(&arguments, suite.trials);
    kernels::say_whose_images();
    conclusion.exit_code()
}
