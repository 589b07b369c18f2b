"""docker/: linted where a linter is there, and its entry points tried outside a container, because no engine runs here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sn29.command_table import COMMANDS
from sn29.localnet import text
from sn29.localnet.network import NETUID, prepare
from sn29.report.metrics import METRICS
from sn29.report.snapshot import ALARMS
from sn29.settings import MinerSettings, ValidatorSettings, default_cache, programs, read, settings_of
from sn29.telemetry import STAGES

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
OTHERS = {
    "PATH", "HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "MPLCONFIGDIR",
    "HF_HUB_DISABLE_TELEMETRY", "BITTENSOR_RUNTIME_CACHE_DIR", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
}  # fmt: skip
"""Variables of others that our files set."""


def _tool(name: str) -> str:
    """A linter of the dev extra or of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not on this machine")


def _passes(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- the image -------------------------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    lines = "\n".join(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def _environment() -> dict[str, str]:
    """What ENV sets in all stages."""
    return dict(pair.partition("=")[::2] for word, rest in _instructions() if word == "ENV" for pair in rest.split())


def _json_of(instruction: str) -> list[str]:
    (found,) = [rest for word, rest in _instructions() if word == instruction]
    return list(json.loads(found[found.index("[") :]))


def test_the_dockerfile_passes_hadolint():
    assert _passes(_tool("hadolint"), str(DOCKER / "Dockerfile")) == ""


def test_the_image_runs_as_nobody_special_and_holds_no_secret():
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in _instructions():
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = steps = []
        elif stages:
            steps.append((word, rest))
    for target in ("cpu", "cuda"):
        users = [rest for word, rest in [*stages["runtime"], *stages[target]] if word == "USER"]
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1]), "Kubernetes can check a number alone"
    assert ("STOPSIGNAL", "SIGTERM") in stages["runtime"]
    names = [rest.partition("=")[0] for word, rest in _instructions() if word == "ARG"] + list(_environment())
    assert not [name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY|MNEMONIC", name)]
    (base,) = [rest.partition("=")[2] for word, rest in _instructions() if word == "ARG" and rest.startswith("PYTHON_IMAGE")]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), "pinned to a release"


def test_only_what_the_image_needs_is_sent_to_the_engine():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for word, rest in _instructions() if word == "COPY" and "--from" not in rest]
    sources = {source for some in copied for source in some}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {package["project"]["readme"], *package["project"]["license-files"]}
    needed |= {name.rstrip("*") for name in package["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert needed <= sources, "what the wheel is built from"


def test_the_requirements_of_the_image_are_those_of_the_package(tmp_path):
    """The line of the Dockerfile, run as it stands, with and without extras."""
    (run,) = [rest for word, rest in _instructions() if word == "RUN" and "tomllib" in rest]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = run.partition(" && ")[0].replace("python ", f"{sys.executable} ", 1)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in ("", "wandb,fleet"):
        _passes("bash", "-euc", f"EXTRAS={extras}\n{script}", cwd=tmp_path)
        more = [line for extra in filter(None, extras.split(",")) for line in project["optional-dependencies"][extra]]
        assert (tmp_path / "requirements.txt").read_text().splitlines() == [*project["dependencies"], *more]


# ---- compose ---------------------------------------------------------------------------------------------------------


def _resolved(value: Any) -> Any:
    """With the defaults of ${NAME:-default}."""
    if isinstance(value, dict):
        return {key: _resolved(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one) for one in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


COMPOSE = _resolved(yaml.safe_load((DOCKER / "compose.yaml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("sn29:")]


def test_compose_is_what_the_specification_says():
    _passes(_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_shut_in(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["profiles"], "nothing starts unasked"
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & service.keys()
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), "a release, not what is newest today"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "loopback alone"
    for mount in service.get("volumes", ()):
        assert "docker.sock" not in str(mount)
        source, _, rest = mount.partition(":") if isinstance(mount, str) else ("", "", "")
        assert not source.startswith((".", "/", "~")) or rest.endswith(":ro"), f"{mount}: a folder of the host is read-only"


@pytest.mark.parametrize("name", OURS)
def test_our_services_stop_in_time_update_by_tag_and_see_one_hotkey(name):
    service = SERVICES[name]
    assert service["stop_signal"] == "SIGTERM"
    seconds = int(re.fullmatch(r"(\d+)s", service["stop_grace_period"])[1])
    assert seconds > read(ValidatorSettings, []).stop_within_s + 5
    assert service["labels"]["com.centurylinklabs.watchtower.enable"] == "true"
    (temporary,) = [entry.partition(":")[2].split(",") for entry in service["tmpfs"] if entry.startswith("/tmp:")]
    assert "exec" in temporary, "what the evaluator compiles lies there and is loaded; the engine's own default is noexec"
    for mount in (one for one in service["volumes"] if isinstance(one, dict)):
        assert mount["read_only"] is True
        assert re.fullmatch(r"/wallets/[^/]+/hotkeys/[^/]+", mount["target"]), "the hotkey's file, and no folder of keys"
        assert mount["source"].endswith(mount["target"].removeprefix("/wallets"))
    folders = {entry.split(":")[1] for entry in service["volumes"] if isinstance(entry, str)}
    assert {"/var/lib/sn29", "/var/cache/sn29"} <= folders


def test_programs_of_one_hotkey_share_their_locks():
    """In a volume of its own, which every user can write to: a named volume takes the mode of the folder of the image."""
    folder = _environment()["SN29_LOCKS_DIR"]
    sources = set()
    for name in ("validator", "validator-cpu", "miner"):
        mounts = [entry.split(":")[:2] for entry in SERVICES[name]["volumes"] if isinstance(entry, str)]
        _, source = max((len(target), source) for source, target in mounts if Path(folder).is_relative_to(target))
        sources.add((source, SERVICES[name]["user"]))
    assert len(sources) == 1
    assert re.search(rf"install -d -m 1777 [^&]*{folder} ", (DOCKER / "Dockerfile").read_text())


def test_a_validator_never_gets_the_token_of_the_hub():
    assert "HF_TOKEN" in SERVICES["miner"]["environment"]
    for name in OURS:
        if name != "miner":
            assert "HF_TOKEN" not in SERVICES[name].get("environment", {})


@pytest.mark.parametrize("name", OURS)
def test_our_commands_and_variables_are_understood(name, monkeypatch, tmp_path):
    """Read as the program would, in an environment that holds the image's and the service's variables alone."""
    for variable in list(os.environ):
        monkeypatch.delenv(variable)
    for variable, value in {**_environment(), **SERVICES[name].get("environment", {})}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.chdir(tmp_path)
    words = SERVICES[name]["command"]
    command = next(known for known in COMMANDS if list(known) == words[: len(known)])
    kind = next(kind for kind in programs() if tuple(kind.program_words()) == command)
    settings = read(kind, words[len(command) :])
    writable = ("/var/lib/sn29/", "/var/cache/sn29/")
    if isinstance(settings, ValidatorSettings | MinerSettings):
        folder = settings.state_dir if isinstance(settings, ValidatorSettings) else settings.work_dir
        assert str(folder).startswith(writable)
        assert str(settings.locks_dir).startswith(writable)
        assert (settings.status_host, settings.status_port) == ("0.0.0.0", 9129)
        mounted = next(one["target"] for one in SERVICES[name]["volumes"] if isinstance(one, dict))
        assert mounted == f"{settings.wallet_path}/{settings.wallet_name}/hotkeys/{settings.wallet_hotkey}"
        assert SERVICES[name]["ports"][0].endswith(f":{settings.status_port}")
    else:
        assert str(settings.localnet_dir).startswith(writable)
        assert str(settings.wallet_path).startswith(writable)


def _known_variables() -> set[str]:
    names = {name for kind in programs() for setting in settings_of(kind) for name in setting.variables}
    return names | OTHERS


def test_every_variable_in_these_files_is_one_that_somebody_reads():
    unit = re.findall(r"^Environment=(.*)$", (DOCKER / "sn29@.service").read_text(), re.MULTILINE)
    used = set(_environment()) | {pair.partition("=")[0] for line in unit for pair in line.split()}
    used |= {name for service in OURS for name in SERVICES[service].get("environment", {})}
    used |= set(re.findall(r"(SN29_\w+): \"", (DOCKER / "ecosystem.config.js").read_text()))
    assert used <= _known_variables()
    assert len(used) > 20


# ---- monitoring ------------------------------------------------------------------------------------------------------


def _expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every rule and every panel."""
    for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "sn29.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    yield from ((one["name"], one["expr"]) for one in dashboard["annotations"]["list"])
    yield from ((one["name"], one["query"]["query"]) for one in dashboard["templating"]["list"])


def test_rules_and_dashboard_name_only_metrics_and_labels_that_exist():
    known = {metric.name: {*metric.labels, "job", "instance"} for metric in METRICS}
    seen = set()
    for where, expression in _expressions():
        names = set(re.findall(r"\bsn29_\w+", expression))
        assert names <= known.keys(), f"{where}: {expression}"
        seen |= names
        for name, inside in re.findall(r"\b(sn29_\w+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)=~?\"", inside))
            assert labels <= known[name], f"{where}: {expression}"
        for label, value in re.findall(r'(stage|alarm)="(\w+)"', expression):
            assert value in {"stage": STAGES, "alarm": ALARMS}[label], f"{where}: {expression}"
    assert len(seen) >= 25, "the dashboard shows most of what there is"


def test_legends_name_labels_that_their_metrics_have():
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "sn29.json").read_text())
    known = {metric.name: {*metric.labels, "job", "instance"} for metric in METRICS}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= set().union(*(known[name] for name in re.findall(r"\bsn29_\w+", target["expr"]))), panel["title"]


def test_grafana_asks_the_prometheus_that_asks_our_services():
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/sn29.yaml").read_text())["datasources"][0]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "sn29.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/sn29.yaml").read_text())["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    asked = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in asked for one in job["static_configs"] for target in one["targets"]}
    port = _environment()["SN29_STATUS_PORT"]
    assert targets == {f"validator:{port}", f"miner:{port}"}
    assert SERVICES["validator-cpu"]["networks"]["sn29"]["aliases"] == ["validator"]


ALERTS = """
rule_files: [RULES]
evaluation_interval: 30s
tests:
  - name: a validator that ends takes its page and all its own metrics with it
    interval: 30s
    input_series:
      - {series: 'up{job="sn29-validator", instance="v"}', values: '1x20 0x40'}
      - {series: 'sn29_up{job="sn29-validator", instance="v"}', values: '1x20 stale'}
      - {series: 'up{job="sn29-miner", instance="never"}', values: '0x60'}
      - {series: 'up{job="sn29-miner", instance="ended"}', values: '1x20 0x40'}
    promql_expr_test:
      - expr: count by (alertname, severity, instance) (ALERTS{alertstate="firing"})
        eval_time: 20m
        exp_samples:
          - {labels: '{alertname="Sn29ValidatorGone", severity="critical", instance="v"}', value: 1}
          - {labels: '{alertname="Sn29MinerGone", severity="warning", instance="ended"}', value: 1}
      - {expr: 'count(ALERTS{alertstate="firing"})', eval_time: 9m, exp_samples: []}
  - name: the first error is one, whether it was counted from 0 or not
    interval: 30s
    input_series:
      - {series: 'sn29_events_total{event="bug", instance="born"}', values: '_x20 1x200'}
      - {series: 'sn29_events_total{event="bug", instance="rises"}', values: '0x20 1x200'}
      - {series: 'sn29_events_total{event="bug", instance="none"}', values: '0x220'}
    promql_expr_test:
      - expr: count by (instance) (ALERTS{alertname="Sn29Bugs", alertstate="firing"})
        eval_time: 15m
        exp_samples: [{labels: '{instance="born"}', value: 1}, {labels: '{instance="rises"}', value: 1}]
      - {expr: 'count(ALERTS{alertstate="firing"})', eval_time: 100m, exp_samples: []}
"""


def test_alerts_are_raised_for_what_ends_and_for_the_first_error(tmp_path):
    (tmp_path / "alerts.yml").write_text(ALERTS.replace("RULES", str(DOCKER / "prometheus" / "alerts.yml")))
    _passes(_tool("promtool"), "test", "rules", str(tmp_path / "alerts.yml"))


def test_prometheus_takes_rules_and_configuration():
    promtool = _tool("promtool")
    _passes(promtool, "check", "config", "prometheus.yml", cwd=DOCKER / "prometheus")


# ---- without containers ----------------------------------------------------------------------------------------------


def test_systemd_takes_the_unit_and_finds_it_shut_in(tmp_path):
    analyze = _tool("systemd-analyze")
    unit = tmp_path / "sn29@validator.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (DOCKER / "sn29@.service").read_text(), flags=re.MULTILINE))
    said = _passes(analyze, "verify", str(unit))
    unknown = [
        line for line in said.splitlines() if unit.name in line and "RestartSteps" not in line and "RestartMax" not in line
    ]
    assert unknown == [], "only the two keys that came with systemd 254 may be unknown"
    _passes(analyze, "security", "--offline=yes", "--threshold=40", str(unit))


def test_the_unit_starts_both_programs_and_lets_them_end():
    unit = (DOCKER / "sn29@.service").read_text()
    assert "SN29_STATUS_PORT" not in "".join(re.findall(r"^Environment=.*$", unit, re.MULTILINE)), "one port for two programs"
    assert not re.search(r"^(ProtectClock|PrivateDevices)=", unit, re.MULTILINE), "they close the GPU, the first before 252"
    settings = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"^[A-Z]\w+=", line))
    assert settings["ExecStart"] == "/opt/sn29/bin/sn29 %i"
    assert {("validator",), ("miner",)} <= COMMANDS.keys()
    assert (settings["KillSignal"], settings["Restart"], settings["NoNewPrivileges"]) == ("SIGTERM", "on-failure", "yes")
    assert int(settings["TimeoutStopSec"]) > read(ValidatorSettings, []).stop_within_s + 5
    folders = set(settings["ReadWritePaths"].split())
    for pair in (pair for line in re.findall(r"^Environment=(.*)$", unit, re.MULTILINE) for pair in line.split()):
        name, _, value = pair.partition("=")
        if value.startswith("/") and "WALLET" not in name:
            assert any(value == folder or value.startswith(f"{folder}/") for folder in folders), pair


def test_pm2_gets_both_programs_with_time_to_end(tmp_path):
    """From the root of the repository, where `sn29` is a folder, which pm2 would try to run."""
    node, program = _tool("node"), tmp_path / "bin" / "sn29"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    script = [node, "-e", "console.log(JSON.stringify(require(process.argv[1])))", str(DOCKER / "ecosystem.config.js")]
    others = {name: value for name, value in os.environ.items() if name != "SN29_BIN"}

    def read_by_node(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env={**others, **env}, check=False)

    for env in ({"PATH": f"/nowhere:{program.parent}"}, {"PATH": "/nowhere", "SN29_BIN": str(program)}):
        done = read_by_node(**env)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [(app["script"], app["args"]) for app in found["apps"]] == [(str(program), "validator"), (str(program), "miner")]
    for env in ({"PATH": f"/nowhere:{ROOT}"}, {"SN29_BIN": "/nowhere/sn29"}):
        assert "SN29_BIN" in read_by_node(**env).stderr, "no program: nothing is started"
    for app in found["apps"]:
        assert app["kill_timeout"] > 1000 * (read(ValidatorSettings, []).stop_within_s + 5)
        assert app["interpreter"] == "none"
        assert app["exp_backoff_restart_delay"] > 0
    assert len({app["env"]["SN29_STATUS_PORT"] for app in found["apps"]}) == 2


def test_nothing_here_pulls_code_into_what_runs():
    for path in (path for path in DOCKER.rglob("*") if path.is_file()):
        for line in path.read_text().splitlines():
            if not line.lstrip().startswith(("#", "//")):
                assert not re.search(r"git (pull|fetch|clone)|pip install (-U|--upgrade)|curl|wget", line), f"{path.name}: {line}"
    assert not list(DOCKER.rglob("*.sh"))


# ---- the entry point, outside ----------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.timeout(240)
def test_the_validator_of_the_image_lives_is_healthy_and_stops_writing_only_where_it_may(tmp_path):
    """ENTRYPOINT, CMD, ENV, HEALTHCHECK and STOPSIGNAL as they stand, with the folders of the volumes below a temporary one: no
    home, an empty working folder that stays empty, and of the wallet the hotkey's file alone, which nobody may write."""
    texts = text.build(default_cache())
    localnet = prepare(tmp_path / "localnet", texts, block_seconds=0.25, window_blocks=4000)
    localnet.register("val", "default", tmp_path / "keys", validator=True)
    hotkey = tmp_path / "wallets" / "val" / "hotkeys" / "default"
    hotkey.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "keys" / "val" / "hotkeys" / "default", hotkey)
    hotkey.chmod(0o400)
    app, temporary, port = tmp_path / "app", tmp_path / "tmp", str(_free_port())
    for folder in (app, temporary, tmp_path / "lib", tmp_path / "cache"):
        folder.mkdir()
    places = {
        "/var/lib/sn29": str(tmp_path / "lib"),
        "/var/cache/sn29": str(tmp_path / "cache"),
        "/wallets": str(tmp_path / "wallets"),
    }
    image = _environment()
    for inside, outside in places.items():
        image = {name: value.replace(inside, outside) for name, value in image.items()}
    image |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SN29_STATUS_PORT": port, "TMPDIR": str(temporary)}
    image |= {"SN29_STATUS_HOST": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    del image["HOME"]
    tini, dashes, *program = [*_json_of("ENTRYPOINT"), *_json_of("CMD")]
    assert (tini, dashes, program) == ("tini", "--", ["sn29", "validator"])
    flags = [
        "--wallet.name", "val", "-n", "localnet", "--localnet.dir", str(localnet.folder), "--hub.endpoint", localnet.endpoint,
        "--netuid", str(NETUID), "--competitions.dir", str(localnet.competitions), "--poll", "0.2", "--threads", "1",
    ]  # fmt: skip
    check = [sys.executable, *_json_of("HEALTHCHECK")[1:]]
    asking = {**image, "http_proxy": "http://127.0.0.1:9"}  # a proxy is for others: nobody is at this one
    assert subprocess.run(check, env=asking, cwd=app, capture_output=True, check=False).returncode != 0, "nothing runs yet"
    unasked = {**asking, "SN29_STATUS_PORT": "0"}
    assert subprocess.run(check, env=unasked, cwd=app, capture_output=True, check=False).returncode == 0, "no page to ask for"
    with localnet.serve(), (tmp_path / "said").open("wb") as said:
        command = [sys.executable, "-m", "sn29.cli", *program[1:], *flags]
        process = subprocess.Popen(command, env=image, cwd=app, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        ends, healthy = time.monotonic() + 150, False
        while not healthy and time.monotonic() < ends and process.poll() is None:
            healthy = subprocess.run(check, env=asking, cwd=app, capture_output=True, check=False).returncode == 0
            time.sleep(0.3)
        (stop,) = [rest for word, rest in _instructions() if word == "STOPSIGNAL"]
        process.send_signal(getattr(signal, stop))
        status = process.wait(int(SERVICES["validator"]["stop_grace_period"].rstrip("s")))
    words = (tmp_path / "said").read_text()
    assert healthy, words[-3000:]
    assert status == 0, words[-3000:]
    assert _files(app) == set(), "the working folder is read-only in the container"
    assert _files(tmp_path / "wallets") == {"val", "val/hotkeys", "val/hotkeys/default"}
    assert "validator/store.db" in _files(tmp_path / "lib")
