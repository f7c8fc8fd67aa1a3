//! How much memory this machine can still give.

use std::fs;

/// Bytes that a program can take without the system having to end one: free memory and swap, within the limit of the
/// container. `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let machine = meminfo_bytes(&meminfo, "MemAvailable")? + meminfo_bytes(&meminfo, "SwapFree").unwrap_or(0);
    Some(container_bytes().map_or(machine, |container| container.min(machine)))
}

/// Memory of the whole machine.
pub fn total_bytes() -> Option<u64> {
    meminfo_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")
}

fn meminfo_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What the memory controller (cgroup v2) leaves: its limit less what is in use, file cache not counted.
fn container_bytes() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?; // "max": no limit
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let statistics = read("memory.stat")?;
    let cache = statistics.lines().find_map(|line| line.strip_prefix("file ")?.trim().parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
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

    #[test]
    fn texts() {
        assert_eq!(bytes_text(999), "999 bytes");
        assert_eq!(bytes_text(12_345_678), "12.3 MB");
        assert_eq!(bytes_text(310_400_000_000), "310.4 GB");
    }
}
