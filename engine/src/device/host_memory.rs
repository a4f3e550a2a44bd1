//! How much host memory this process can still use: what the system has, or the control group that it runs in, whichever is
//! less. A container sees the whole machine's memory in `/proc/meminfo` and is ended when it takes more than its group has.

use std::path::Path;

/// Where control groups show themselves.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes of host memory that can still be used without swapping; `u64::MAX` where the system does not tell.
pub(super) fn available_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let system = of_system(&read("/proc/meminfo")).unwrap_or(u64::MAX);
    system.min(of_groups(Path::new(GROUPS), &read("/proc/self/cgroup")).unwrap_or(u64::MAX))
}

fn of_system(meminfo: &str) -> Option<u64> {
    let kibibytes = number_after(meminfo, "MemAvailable:")?;
    kibibytes.checked_mul(1024)
}

/// The least that any of the process's control groups leaves, in either version of control groups; `memberships` is what
/// `/proc/self/cgroup` says.
fn of_groups(mount: &Path, memberships: &str) -> Option<u64> {
    let groups = memberships.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let path = path.trim_start_matches('/').to_owned();
        match controllers {
            "" => Some((&V2, mount.to_path_buf(), path)),
            _ if controllers.split(',').any(|name| name == "memory") => Some((&V1, mount.join("memory"), path)),
            _ => None,
        }
    });
    groups
        .flat_map(|(files, root, path)| {
            // A limit holds for all groups below; inside a container the path may be the host's, and only the root is there.
            let groups: Vec<u64> = Path::new(&path)
                .ancestors()
                .filter_map(|group| files.available(&root.join(group)))
                .collect();
            groups
        })
        .min()
}

/// The names under which a version of control groups keeps its numbers.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Entries of `memory.stat` that count files in memory, which make room when it is needed.
    reclaimable: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};

const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
};

impl Files {
    /// What the group leaves; `None` where it has no limit.
    fn available(&self, group: &Path) -> Option<u64> {
        let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let limit: u64 = read(self.limit)?.trim().parse().ok()?;
        let usage: u64 = read(self.usage)?.trim().parse().ok()?;
        let stat = read("memory.stat").unwrap_or_default();
        let files = self
            .reclaimable
            .iter()
            .filter_map(|name| number_after(&stat, name))
            .sum();
        Some(limit.saturating_sub(usage.saturating_sub(files)))
    }
}

/// The number that follows `name` at the start of a line.
fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(found, _)| *found == name)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells_what_is_available() {
        let meminfo = "MemTotal:       24690000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(of_system(meminfo), Some(23_000_000 * 1024));
        assert_eq!(of_system("MemTotal: 5 kB\n"), None);
        assert!(available_memory() > 0);
    }

    #[test]
    fn the_tightest_group_counts() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(of_groups(folder.path(), "0::/user/app\n"), None);
        write("user/app/memory.max", "max\n");
        write("user/app/memory.current", "700\n");
        assert_eq!(of_groups(folder.path(), "0::/user/app\n"), None);
        write("user/memory.max", "1000\n");
        write("user/memory.current", "900\n");
        write("user/memory.stat", "anon 500\ninactive_file 100\nactive_file 150\n");
        assert_eq!(of_groups(folder.path(), "0::/user/app\n"), Some(350));

        let memberships = "5:devices:/\n4:cpu,memory:/process/7\n0::/\n";
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/memory.usage_in_bytes", "10\n");
        write("memory/process/7/memory.limit_in_bytes", "4096\n");
        write("memory/process/7/memory.usage_in_bytes", "5000\n");
        assert_eq!(of_groups(folder.path(), memberships), Some(0));
        // The path of the host, which a container does not see.
        assert_eq!(
            of_groups(folder.path(), "4:memory:/docker/ab\n"),
            Some(9_223_372_036_854_771_702)
        );
    }
}
