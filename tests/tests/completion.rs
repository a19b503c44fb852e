//! What the Tab key offers in bash, zsh and fish: names of what is there now.

use std::process::Command;

use vireo_tests::{Rig, Run, left_out, tiny_guest, which};

fn two_domains() -> Rig {
    let rig = Rig::new();
    rig.define(&tiny_guest(&rig, "alpha", "qemu"));
    rig.define(&tiny_guest(&rig, "alpine", "qemu"));
    rig
}

/// Runs a shell's script with our program in its path.
fn shell(rig: &Rig, program: &str, script: &str) -> String {
    let own = rig.command("vireo");
    let folder = std::path::Path::new(own.get_program()).parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .args(["-c", script])
        .env("PATH", format!("{}:{path}", folder.display()))
        .env("VIREO_ROOT", rig.root())
        .env("HOME", rig.root())
        .env("LC_ALL", "C.UTF-8")
        .env("VIREO_TEST_RIG", rig.root().file_name().unwrap())
        .current_dir(rig.root());
    Run::from(command.output().unwrap()).ok()
}

#[test]
fn bash_offers_what_is_there() {
    let rig = two_domains();
    rig.vireo(&["start", "alpha", "--paused"]).ok();
    // As readline calls it: words taken apart at '=' and ':'.
    let script = r#"
        eval "$(vireo completion bash)"
        offer() {
            COMP_LINE=$1 COMP_POINT=${#1}
            shift
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
            _vireo
            echo "${COMPREPLY[*]}"
        }
        offer 'vireo domst' vireo domst
        offer 'vireo dominfo al' vireo dominfo al
        offer 'vireo dominfo --domain=alpi' vireo dominfo --domain = alpi
        offer 'vireo dominfo --domain ' vireo dominfo --domain ''
        offer 'vireo -c vireo:///sy' vireo -c vireo : ///sy
        offer 'vireo event --event reb' vireo event --event reb
        offer 'vireo domstate alpha --' vireo domstate alpha --
        offer 'vireo --read' vireo --read
        offer 'vireo net-event --event ' vireo net-event --event ''
        offer 'vireo nonsense ' vireo nonsense ''
        offer 'vireo start al' vireo start al
        offer 'vireo destroy al' vireo destroy al
        offer 'vireo suspend al' vireo suspend al
        offer 'vireo resume al' vireo resume al
    "#;
    assert_eq!(
        shell(&rig, "bash", script),
        "domstate domstats\nalpha alpine\nalpine\nalpha alpine\n///system\nreboot\n--reason\n--readonly\nlifecycle\n\n\
         alpine\nalpha\n\nalpha\n"
    );
}

#[test]
fn zsh_and_fish_offer_the_same() {
    let rig = two_domains();
    if which("fish") {
        let script = "vireo completion fish | source; complete -C 'vireo dominfo al'; \
                      complete -C 'vireo dominfo --domain=alpi'";
        assert_eq!(
            shell(&rig, "fish", script),
            "alpha\nalpine\n--domain=alpine\n"
        );
    } else {
        left_out("completion in fish needs fish");
    }
    if which("zsh") {
        // A terminal of its own, as completion works only where somebody types.
        let script = r#"
            zmodload zsh/zpty
            zpty shell 'zsh -f -i'
            zpty -w shell 'autoload -Uz compinit; compinit -u -D; PS1=; eval "$(vireo completion zsh)"; print RE"ADY"'
            zpty -r shell said '*READY*'
            zpty -w -n shell $'vireo dominfo alpi\t'
            zpty -r shell said '*alpine*' && print yes
        "#;
        assert_eq!(shell(&rig, "zsh", script), "yes\n");
    } else {
        left_out("completion in zsh needs zsh");
    }
}

#[test]
fn no_daemon_is_started_for_it() {
    let rig = Rig::new();
    assert_eq!(rig.vireo(&["complete", "--", "dominfo", ""]).ok(), "");
    assert!(rig.processes("vireod").is_empty());
    let error = rig.vireo(&["completion", "tcsh"]).fails();
    assert!(error.contains("bash, zsh and fish"), "{error}");
}
