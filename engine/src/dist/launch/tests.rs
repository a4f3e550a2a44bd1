use super::*;

fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
    let variables = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Launch::from_variables(&variables.collect())
}

fn found(variables: &[(&str, &str)]) -> Launch {
    launch(variables).unwrap().expect("a launcher is recognised")
}

fn refusal(variables: &[(&str, &str)]) -> String {
    launch(variables).expect_err("the variables make no sense").to_string()
}

const TORCHRUN: [(&str, &str); 7] = [
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "gpu1"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "abc"),
];

const OPEN_MPI: [(&str, &str); 5] = [
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ("PMIX_NAMESPACE", "prterun-gpu1-123@1"),
];

const SLURM: [(&str, &str); 7] = [
    ("SLURM_PROCID", "2"),
    ("SLURM_STEP_NUM_TASKS", "4"),
    ("SLURM_NTASKS", "16"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_STEP_NODELIST", "gpu[03-04,07]"),
    ("SLURM_JOB_ID", "77"),
    ("SLURM_STEP_ID", "0"),
];

/// `base` with a variable changed or added; an empty value counts as none.
fn with<'a>(base: &[(&'a str, &'a str)], name: &'a str, value: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut variables: Vec<_> = base.iter().copied().filter(|(other, _)| *other != name).collect();
    variables.push((name, value));
    variables
}

#[test]
fn nobody_is_alone_who_was_not_launched() {
    assert!(launch(&[]).unwrap().is_none());
    assert!(launch(&[("MASTER_ADDR", "a"), ("HOME", "/root")]).unwrap().is_none());
    // A shell of an allocation, and a batch script, are no steps.
    assert!(
        launch(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_JOB_ID", "7")])
            .unwrap()
            .is_none()
    );
}

#[test]
fn torchrun_is_recognised() {
    let launch = found(&TORCHRUN);
    assert_eq!(
        (launch.rank, launch.world, launch.local_rank, launch.local_world),
        (5, 8, 1, Some(4))
    );
    assert_eq!((launch.host.as_str(), launch.port), ("gpu1", 29500));
    assert!(!launch.on_one_machine());
    // Its own store listens on that port: all ranks derive the same other one, and it can be chosen.
    let stored = with(&TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "True");
    let port = found(&stored).port;
    assert!((20_000..30_000).contains(&port));
    assert_eq!(found(&with(&stored, "RANK", "0")).port, port);
    assert_ne!(found(&with(&stored, "MASTER_PORT", "29501")).port, port);
    assert_eq!(found(&with(&stored, "L2P_MASTER_PORT", "4000")).port, 4000);
    let static_store = with(&TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "False");
    assert_eq!(found(&static_store).port, 29500);
}

#[test]
fn variables_by_hand_need_no_more_than_they_must() {
    let alone = found(&[("RANK", "0"), ("WORLD_SIZE", "1")]);
    assert_eq!((alone.rank, alone.world), (0, 1));
    let here = [
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "5000"),
    ];
    assert_eq!(found(&here).local_rank, 1);
    let elsewhere = with(&here, "MASTER_ADDR", "gpu1");
    assert!(refusal(&elsewhere).starts_with("LOCAL_RANK is not set: 2 ranks need this rank's number on its machine"));
    assert!(refusal(&with(&here, "MASTER_ADDR", "")).starts_with("MASTER_ADDR is not set"));
    assert!(refusal(&with(&here, "MASTER_PORT", "")).starts_with("MASTER_PORT is not set"));
}

#[test]
fn open_mpi_is_recognised() {
    let launch = found(&OPEN_MPI);
    assert_eq!((launch.rank, launch.world, launch.local_rank), (3, 4, 3));
    assert_eq!(launch.host, "127.0.0.1");
    assert!(launch.on_one_machine());
    assert!((20_000..30_000).contains(&launch.port));
    assert_ne!(
        found(&with(&OPEN_MPI, "PMIX_NAMESPACE", "prterun-gpu1-124@1")).port,
        launch.port
    );
    assert_eq!(found(&with(&OPEN_MPI, "MASTER_PORT", "4001")).port, 4001);
    // Version 4 names its job otherwise.
    let older = with(&with(&OPEN_MPI, "PMIX_NAMESPACE", ""), "OMPI_MCA_ess_base_jobid", "123");
    assert_eq!(found(&older).job, "123");

    let two_machines = with(&OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE", "2");
    let two_machines = with(&two_machines, "OMPI_COMM_WORLD_LOCAL_RANK", "1");
    let message = refusal(&two_machines);
    assert!(message.contains("add -x MASTER_ADDR=HOST to mpirun"), "{message}");
    assert_eq!(found(&with(&two_machines, "MASTER_ADDR", "gpu1")).host, "gpu1");
}

#[test]
fn slurm_is_recognised_in_a_step() {
    let launch = found(&SLURM);
    assert_eq!(
        (launch.rank, launch.world, launch.local_rank, launch.local_world),
        (2, 4, 0, None)
    );
    assert_eq!((launch.host.as_str(), launch.job.as_str()), ("gpu03", "77.0"));
    assert_ne!(found(&with(&SLURM, "SLURM_JOB_ID", "78")).port, launch.port);
    assert_eq!(found(&with(&SLURM, "MASTER_ADDR", "x")).host, "x");
    let message = refusal(&with(&SLURM, "SLURM_STEP_NODELIST", "gpu[oops"));
    assert_eq!(
        message,
        "SLURM_STEP_NODELIST is `gpu[oops`, which names no host: set MASTER_ADDR to that of rank 0"
    );
    let one_machine = with(&SLURM, "SLURM_STEP_NUM_NODES", "1");
    assert!(found(&with(&one_machine, "SLURM_LOCALID", "2")).on_one_machine());
}

#[test]
fn torchrun_within_another_launcher_counts() {
    let both: Vec<_> = TORCHRUN.iter().chain(&SLURM).copied().collect();
    assert_eq!(found(&both).rank, 5);
    let all: Vec<_> = both.iter().chain(&OPEN_MPI).copied().collect();
    assert_eq!(found(&all).rank, 5);
    let two: Vec<_> = SLURM.iter().chain(&OPEN_MPI).copied().collect();
    assert_eq!(found(&two).launcher, Launcher::OpenMpi);
    // Scripts for Slurm like to export this one.
    assert_eq!(found(&with(&SLURM, "WORLD_SIZE", "4")).rank, 2);
}

#[test]
fn contradictions_are_named() {
    for (variables, message) in [
        (
            with(&TORCHRUN, "RANK", "8"),
            "RANK is 8, but WORLD_SIZE is 8: ranks are counted from 0",
        ),
        (
            with(&TORCHRUN, "RANK", "-1"),
            "RANK is `-1`, which is not a whole number",
        ),
        (
            with(&TORCHRUN, "WORLD_SIZE", "0"),
            "WORLD_SIZE: expected a whole number from 1 to 4096, found 0",
        ),
        (
            with(&TORCHRUN, "LOCAL_RANK", "4"),
            "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4: ranks are counted from 0",
        ),
        (
            with(&TORCHRUN, "LOCAL_WORLD_SIZE", "9"),
            "LOCAL_WORLD_SIZE is 9, but WORLD_SIZE is 8",
        ),
        (
            with(&TORCHRUN, "MASTER_PORT", "70000"),
            "MASTER_PORT is 70000; a port lies from 1 to 65535",
        ),
        (
            with(&TORCHRUN, "WORLD_SIZE", ""),
            "RANK is set, but WORLD_SIZE is not: a launcher such as torchrun sets both; remove RANK to run alone",
        ),
        (
            vec![("WORLD_SIZE", "4")],
            "WORLD_SIZE is set, but RANK is not: a launcher such as torchrun sets both; remove WORLD_SIZE to run alone",
        ),
        (
            with(&SLURM, "WORLD_SIZE", "16"),
            "WORLD_SIZE is 16, but Slurm says 4: remove WORLD_SIZE, or set both RANK and WORLD_SIZE",
        ),
        (
            with(&OPEN_MPI, "OMPI_COMM_WORLD_SIZE", ""),
            "OMPI_COMM_WORLD_SIZE is not set, but OMPI_COMM_WORLD_RANK is: start with mpirun",
        ),
        (
            with(&OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "3"),
            "OMPI_COMM_WORLD_RANK is 3, but OMPI_COMM_WORLD_SIZE is 3: ranks are counted from 0",
        ),
    ] {
        assert_eq!(refusal(&variables), message);
    }
}

#[test]
fn each_rank_takes_the_gpu_of_its_place() {
    let launch = found(&TORCHRUN);
    let index = |choice, gpus| launch.device_index(choice, || gpus);
    assert_eq!(index(DeviceChoice::Cpu, 8).unwrap(), None);
    assert_eq!(index(DeviceChoice::Auto, 8).unwrap(), Some(1));
    assert_eq!(index(DeviceChoice::Cuda(0), 4).unwrap(), Some(1));
    assert_eq!(index(DeviceChoice::Auto, 0).unwrap(), None);
    assert_eq!(index(DeviceChoice::Auto, 1).unwrap(), Some(0));
    // Asked for by name it is opened, which fails with the reason.
    assert_eq!(index(DeviceChoice::Cuda(0), 0).unwrap(), Some(0));
    assert!(
        index(DeviceChoice::Cuda(3), 8)
            .unwrap_err()
            .to_string()
            .contains("say --device cuda")
    );
    let fourth = found(&with(&TORCHRUN, "LOCAL_RANK", "3"));
    let message = fourth.device_index(DeviceChoice::Auto, || 2).unwrap_err().to_string();
    assert!(
        message.starts_with("rank 5 is number 4 on its machine, which shows 2 GPUs"),
        "{message}"
    );
    let alone = found(&[("RANK", "0"), ("WORLD_SIZE", "1")]);
    assert_eq!(alone.device_index(DeviceChoice::Cuda(3), || 8).unwrap(), Some(3));
}
