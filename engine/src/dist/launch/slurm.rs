//! Slurm's lists of hosts: `gpu[01-04,07],login2`, with several brackets in a name where the cluster has more than one number.

/// The first host of a list; `None` where it names none.
pub(super) fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        host.push_str(&rest[..end]);
        rest = &rest[end..];
        let Some(inside) = rest.strip_prefix('[') else {
            break;
        };
        let (numbers, after) = inside.split_once(']')?;
        // Digits keep their leading zeros: `01-04` begins with `01`.
        let first = numbers.split(['-', ',']).next()?.trim();
        if first.is_empty() || !first.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        host.push_str(first);
        rest = after;
    }
    let host = host.trim();
    let named = !host.is_empty()
        && host
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | '_' | ':'));
    named.then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::first_host;

    #[test]
    fn the_first_host_of_a_list_is_found() {
        for (list, host) in [
            ("gpu1", "gpu1"),
            ("gpu1,gpu2", "gpu1"),
            ("gpu[01-04,07],x2", "gpu01"),
            ("gpu[7,01-04]", "gpu7"),
            ("rack[2-3]node[004-010].cluster,login", "rack2node004.cluster"),
            ("n[12]-ib", "n12-ib"),
            (" a.b.c , d", "a.b.c"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for list in ["", " ", ",a", "gpu[01", "gpu[]", "gpu[a-b]", "gpu]1", "[", "a b"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }
}
