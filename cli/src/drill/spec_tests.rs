use super::*;

const LEADER_LOSS: &str = include_str!("../../../deploy/drills/leader-loss.yaml");
const CLUSTER_LOSS: &str = include_str!("../../../deploy/drills/cluster-loss.yaml");

#[test]
fn the_shipped_drills_are_read() {
    let drill: Drill = LEADER_LOSS.parse().unwrap();
    let (fault, lease, at) = drill.fault().unwrap();
    assert_eq!((fault, lease, at), (&Fault::Kill(Target::LeaderOf("west".parse().unwrap())), Millis(60_000), 1));
    assert_eq!(drill.length(), Millis(45_000));
    assert!(drill.phases[0].until_steady && !drill.phases[1].until_steady);
    let drill: Drill = CLUSTER_LOSS.parse().unwrap();
    assert_eq!(drill.fault().unwrap().0.to_string(), "kill -9 of all of west, replicas and nodes");
    assert_eq!(drill.cells().iter().map(ClusterId::as_str).collect::<Vec<_>>(), ["east", "west"]);
    assert_eq!(drill.steady[1].by.as_deref(), Some("west"));
}

/// One change to a good file, and the refusal that it must meet.
#[test]
fn what_is_not_understood_or_not_safe_does_not_run() {
    let all = "heal: all, for: 30s";
    for (from, to, code, expected) in [
        ("owner: platform", "owner: platform, x: y", Code::ConfigInvalid, "a drill as"),
        ("kind: Drill", "kind: Policy", Code::ConfigInvalid, "apiVersion ambit/v1 and kind Drill"),
        ("ambit/v1", "ambit/v2", Code::ConfigInvalid, "apiVersion ambit/v1 and kind Drill"),
        ("clusters: [west]", "clusters: [north]", Code::DrillGuard, "a fault within scope.clusters"),
        ("protected: [east]", "protected: [west]", Code::DrillGuard, "no fault in scope.protected"),
        ("lease: 60s, ", "", Code::ConfigInvalid, "a lease in phase 'break'"),
        ("lease: 60s", "lease: 5s", Code::ConfigInvalid, "a lease in whole seconds, longer than the 5s"),
        (all, "for: 30s", Code::ConfigInvalid, "a baseline phase, then one that injects"),
        ("name: heal", "name: break", Code::ConfigInvalid, "each phase with a name of its own"),
        ("every: 10ms", "every: 10s", Code::ConfigInvalid, "a probe every 1ms to 1s"),
        ("every: 10ms", "every: 10", Code::ConfigInvalid, "a drill as"),
        ("okPercent: 100", "okPercent: 101", Code::ConfigInvalid, "okPercent of 1-100"),
        ("rto: {writer: 2s}", "rto: {caller: 2s}", Code::ConfigInvalid, "probes.caller"),
        ("longer: 2m", "longer: 2m, probe: writer", Code::ConfigInvalid, "abort:"),
        (
            "quorumSurvives: west",
            "quorumSurvives: west\n      quorum: west",
            Code::ConfigInvalid,
            "one of quorumSurvives",
        ),
        ("kill: leader-of west", "kill: leader", Code::ConfigInvalid, "leader-of CELL"),
        ("kill: leader-of west", "kill: west-r1, kill-site: west", Code::ConfigInvalid, "a drill as"),
        ("kill: leader-of west", "kill-site: west", Code::DrillGuard, "a report sealed at cells that survive"),
        ("kill: leader-of west", "melt: west-r1", Code::ConfigInvalid, "a drill as"),
        ("kill: leader-of west", "cut: 'west:east'", Code::DrillGuard, "a fault within scope.clusters"),
        ("kill: leader-of west", "cut: 'west:west'", Code::ConfigInvalid, "two sites"),
        ("kill: leader-of west", "cut: west-r1>east-r1", Code::ConfigInvalid, "two machines of one site"),
        ("kill: leader-of west", "pause: east-r1", Code::DrillGuard, "a fault within scope.clusters"),
        ("sealAt: west", "sealAt: []", Code::ConfigInvalid, "sealAt of 1-8 cells"),
        ("sealAt: west", "sealAt: [west, west]", Code::ConfigInvalid, "sealAt of 1-8 cells"),
        ("duplicatedWrites: 0", "outsideFailedCalls: 0", Code::ConfigInvalid, "probes.outside"),
        ("for: 5s", "for: 23h", Code::ConfigInvalid, "at most 30m in all"),
        ("until: steady", "until: done", Code::ConfigInvalid, "a drill as"),
        ("name: leader-loss", "name: Leader", Code::ConfigInvalid, "a drill as"),
    ] {
        assert!(LEADER_LOSS.contains(from), "{from}");
        let refusal = LEADER_LOSS.replacen(from, to, 1).parse::<Drill>().expect_err(to);
        assert_eq!(refusal.code, code, "{to}: {refusal}");
        assert!(refusal.expected.starts_with(expected), "{to}: {refusal}");
    }
    let empty =
        LEADER_LOSS.split("  objectives:").next().unwrap().to_owned() + "  objectives: {}\n  report: {sealAt: west}\n";
    assert_eq!(empty.parse::<Drill>().unwrap_err().expected, "at least one objective");
}

#[test]
fn a_single_member_can_be_killed() {
    let drill: Drill = LEADER_LOSS.replacen("kill: leader-of west", "kill: west-n1", 1).parse().unwrap();
    let member = Target::Member("west".parse().unwrap(), "west-n1".into());
    assert_eq!(drill.fault().unwrap().0, &Fault::Kill(member));
}
