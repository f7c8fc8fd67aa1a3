//! How much memory this machine can still give.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that a program can take without the system having to end one or to swap: free memory of the machine, within the
/// limits of the groups (containers, jobs) that the process is in. `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let machine = meminfo_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")?;
    Some(groups().iter().map(|group| group.available_bytes).fold(machine, u64::min))
}

/// Memory of the whole machine, or the smallest limit of the process's groups.
pub fn total_bytes() -> Option<u64> {
    let machine = meminfo_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")?;
    Some(groups().iter().map(|group| group.limit_bytes).fold(machine, u64::min))
}

fn meminfo_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A group of processes whose memory is limited (cgroup).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    limit_bytes: u64,
    /// The limit less what is in use; the file cache, which the system gives up when asked, is not in use.
    available_bytes: u64,
}

/// The names of a version's files, and of the lines of memory.stat that count the file cache and what of it cannot be
/// given up: the files of a file system in memory.
struct Names {
    limit: &'static str,
    used: &'static str,
    cache: &'static str,
    kept: &'static str,
}

const V1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", cache: "total_cache", kept: "total_shmem" };
const V2: Names = Names { limit: "memory.max", used: "memory.current", cache: "file", kept: "shmem" };

fn groups() -> Vec<Group> {
    groups_in(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

/// The limited groups among the process's own and their parents, of both versions. `own`: /proc/self/cgroup, with lines
/// `0::/path` (version 2) and `4:memory:/path` (version 1, whose memory controller has a tree of its own). A container
/// sees its group at the root, though `own` may name the path outside; so what is not there is passed over.
fn groups_in(mounted: &Path, own: &str) -> Vec<Group> {
    let line = |of_memory: &dyn Fn(&str) -> bool| {
        let mut lines = own.lines().filter_map(|line| line.splitn(3, ':').skip(1).collect::<Vec<_>>().try_into().ok());
        lines.find_map(|[controllers, path]: [&str; 2]| of_memory(controllers).then(|| path.to_string()))
    };
    let v1 = line(&|controllers| controllers.split(',').any(|name| name == "memory")).unwrap_or_default();
    let v2 = line(&str::is_empty).unwrap_or_default();
    let trees = [("", &v2, V2), ("unified", &v2, V2), ("memory", &v1, V1)];
    let mut found = Vec::new();
    for (tree, path, names) in trees {
        let own = Path::new(path.trim_start_matches('/'));
        let folders: Vec<PathBuf> = own.ancestors().map(|group| mounted.join(tree).join(group)).collect();
        found.extend(folders.iter().filter_map(|folder| group(folder, &names)));
    }
    found
}

/// `None`: no group, or one without a limit.
fn group(folder: &Path, names: &Names) -> Option<Group> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let limit_bytes: u64 = read(names.limit)?.trim().parse().ok()?; // version 2 says "max" where there is none
    let used: u64 = read(names.used)?.trim().parse().ok()?;
    let statistics = read("memory.stat").unwrap_or_default();
    let amount = |name: &str| {
        let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok();
        statistics.lines().find_map(value).unwrap_or(0)
    };
    let cache = amount(names.cache).saturating_sub(amount(names.kept));
    Some(Group { limit_bytes, available_bytes: limit_bytes.saturating_sub(used.saturating_sub(cache)) })
}

/// `310.4 GB`, `12.3 MB`: powers of 1000.
pub fn bytes_text(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e12 => format!("{:.1} TB", b / 1e12),
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_lines() {
        let text = "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   17000000 kB\nHugePages_Total:   0\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(24_576_000 * 1024));
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(17_000_000 * 1024));
        assert_eq!(meminfo_bytes(text, "SwapFree"), None);
    }

    /// A tree of groups with `[folder, limit, used, statistics]` each.
    fn tree(names: &Names, groups: &[[&str; 4]]) -> tempfile::TempDir {
        let mounted = tempfile::tempdir().unwrap();
        for [folder, limit, used, statistics] in groups {
            let folder = mounted.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            for (name, value) in [(names.limit, limit), (names.used, used), ("memory.stat", statistics)] {
                fs::write(folder.join(name), format!("{value}\n")).unwrap();
            }
        }
        mounted
    }

    fn available(mounted: &tempfile::TempDir, own: &str) -> Option<u64> {
        groups_in(mounted.path(), own).iter().map(|group| group.available_bytes).min()
    }

    #[test]
    fn the_smallest_limit_of_a_group_and_its_parents_counts() {
        let job = tree(
            &V2,
            &[
                [".", "max", "900", "file 0"],
                ["slurm/job", "600", "150", "file 100\nshmem 50"],
                ["slurm/job/step", "5000", "20", "anon 20"],
            ],
        );
        // 100 of cache, half of it files in memory: 100 of 600 are in use.
        assert_eq!(available(&job, "0::/slurm/job/step\n"), Some(500));
        assert_eq!(available(&job, "0::/slurm/job/step/task\n"), Some(500), "a group that cannot be seen");
        assert_eq!(available(&job, "0::/slurm/other\n"), None);
        assert_eq!(groups_in(job.path(), "0::/slurm/job\n"), [Group { limit_bytes: 600, available_bytes: 500 }]);
    }

    #[test]
    fn the_memory_controller_of_version_1_has_its_own_tree() {
        let unlimited = "9223372036854771712";
        let groups =
            [["memory", unlimited, "9", ""], ["memory/a", "700", "300", "total_cache 100"], ["cpu/b", "1", "1", ""]];
        let tree = tree(&V1, &groups);
        let own = "5:cpu,cpuacct:/b\n4:hugetlb,memory:/a\n0::/c\n";
        assert_eq!(available(&tree, own), Some(500));
        let without = groups_in(tree.path(), "0::/c\n");
        assert!(without.iter().all(|group| group.limit_bytes.to_string() == unlimited), "{without:?}");
    }

    #[test]
    fn in_a_container_the_limit_is_at_the_root() {
        let container = tree(&V2, &[[".", "600", "100", "file 0"]]);
        assert_eq!(available(&container, "0::/docker/0123456789abcdef\n"), Some(500));
        assert_eq!(available(&container, ""), Some(500));
    }

    #[test]
    fn texts() {
        assert_eq!(bytes_text(999), "999 bytes");
        assert_eq!(bytes_text(12_345_678), "12.3 MB");
        assert_eq!(bytes_text(310_400_000_000), "310.4 GB");
    }
}
