use loopengine::instance::{spec::*, *};
fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().collect();
    let path = match args[2].as_str() { "copy" => DataPath::Copy, "auto" => DataPath::Auto, _ => DataPath::Batch };
    let tuning = Tuning { linked_commit: args[3] == "linked", poll_us: args[4].parse().unwrap() };
    std::fs::create_dir_all("/run/le").unwrap();
    let spec = InstanceSpec { name: "default".into(), max_devices: 1024, workers: 0, cpus: None };
    let (engine, notes) = Engine::start(EngineConfig { run_dir: "/run/le".into(), default_instance: spec, tuning }).unwrap();
    eprintln!("{notes:?}");
    let f = std::fs::File::options().read(true).write(true).open(&args[1]).unwrap();
    let t = std::time::Instant::now();
    let a = AttachSpec { instance: "default".into(), path: args[1].clone(), number: None, read_only: false, offset: 0, size_limit: 0, block_size: 0, buffered: false, queues: 0, depth: 0, data_path: Some(path) };
    let d = engine.attach(&a, f.into()).unwrap();
    eprintln!("{:?} {d:?}", t.elapsed());
    let code = std::process::Command::new("sh").arg("-c").arg(&args[5]).env("DEV", &d.node).status().unwrap();
    eprintln!("{code:?} {:?}", engine.stats(&Selector::All));
    let t = std::time::Instant::now();
    eprintln!("{:?}", engine.detach(&Selector::All, false));
    eprintln!("detach {:?}", t.elapsed());
    eprintln!("{:?}", engine.shutdown());
}
