//! How much memory a program may still take.

use std::path::{Path, PathBuf};

/// Bytes that can be taken before the system must move something out: what is free on the machine, and within the limits of the
/// control groups that this process is in. None where the system does not say.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = 1024 * line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| limit_of(line, Path::new("/sys/fs/cgroup")));
    Some(limits.fold(machine, u64::min))
}

/// What a line of `/proc/self/cgroup` leaves: the least of a group and those that it is in.
fn limit_of(line: &str, root: &Path) -> Option<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
    let (root, limit, used): (PathBuf, _, _) = match controllers {
        "" => (root.into(), "memory.max", "memory.current"),
        names if names.split(',').any(|name| name == "memory") => {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        }
        _ => return None,
    };
    let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = root.join(path);
    let groups = group.ancestors().take_while(|group| group.starts_with(&root));
    groups
        .filter_map(|group| {
            let (limit, used) = (number(group.join(limit))?, number(group.join(used)).unwrap_or(0));
            // What files have in memory counts as used, and can be had back.
            let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let files: u64 = stat
                .lines()
                .filter_map(|line| line.strip_prefix("inactive_file ").or(line.strip_prefix("active_file ")))
                .filter_map(|bytes| bytes.trim().parse::<u64>().ok())
                .sum();
            Some(limit.saturating_sub(used.saturating_sub(files)))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_of_the_groups_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "600\n");
        write("a/memory.stat", "anon 300\ninactive_file 200\nactive_file 100\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(limit_of("0::/a/b", root.path()), Some(700));
        write("a/b/memory.max", "500\n");
        write("a/b/memory.current", "400\n");
        assert_eq!(limit_of("0::/a/b", root.path()), Some(100));
        write("memory/c/memory.limit_in_bytes", "80");
        assert_eq!(limit_of("4:cpu,memory:/c", root.path()), Some(80));
        assert_eq!(limit_of("5:cpuset:/c", root.path()), None);
        assert_eq!(limit_of("0::/nowhere", root.path()), None);
        assert!(available_memory().is_none_or(|bytes| bytes > 0));
    }
}
