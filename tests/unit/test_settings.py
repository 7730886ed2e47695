from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hubpeer import settings
from hubpeer.errors import SettingsError
from hubpeer.settings import Settings, load


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """No `hubpeer.toml` but the one a test writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toml(text: str) -> Path:
    path = Path("other.toml")
    path.write_text(text, "utf-8")
    return path


def refused(path: Path | None = None, environ: dict[str, str] | None = None, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(path, environ or {}, overrides)
    return str(caught.value)


# ── where settings come from ────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_given_means_the_defaults():
    assert load(environ={}) == Settings()


def test_the_default_cards_are_the_specifications():
    cards = {name: (card.capabilities, card.specialties) for name, card in load(environ={}).cards.items()}
    assert cards == {
        "finance": (
            ["financial_analysis", "budget_planning", "roi_calculation", "risk_assessment"],
            ["cash_flow", "profitability", "compliance", "forecasting"],
        ),
        "marketing": (
            ["campaign_analysis", "customer_segmentation", "roi_analysis", "attribution_modeling"],
            ["digital_marketing", "content_strategy", "customer_acquisition"],
        ),
        "sales": (
            ["pipeline_forecasting", "deal_analysis", "performance_analysis", "territory_planning"],
            ["deal_management", "quota_planning", "customer_health"],
        ),
        "ceo": (
            ["strategic_analysis", "cross_functional_synthesis", "board_reporting", "scenario_planning"],
            ["strategic_planning", "competitive_intelligence", "executive_decision_support"],
        ),
    }


def test_hubpeer_toml_in_the_working_directory_is_read(empty_directory):
    (empty_directory / "hubpeer.toml").write_text("[server]\nport = 4333\n")
    assert load(environ={}).server.port == 4333


def test_a_named_file_is_read_instead_of_the_one_in_the_working_directory(empty_directory):
    (empty_directory / "hubpeer.toml").write_text("[server]\nport = 4333\n")
    assert load(toml("[server]\nport = 4444"), {}).server.port == 4444


def test_the_process_environment_is_read_where_no_other_is_given(monkeypatch):
    monkeypatch.setenv("HUBPEER_DATA", "elsewhere")
    assert load().data == "elsewhere"


def test_later_wins_file_then_environment_then_command_line():
    path = toml("data = 'file'\nlog = 'debug'\n[server]\nport = 1\nhost = 'file'")
    found = load(path, {"HUBPEER_LOG": "warning", "HUBPEER_SERVER__PORT": "2"}, {"server.port": 3})
    assert (found.data, found.server.host, found.log, found.server.port) == ("file", "file", "warning", 3)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DATA", "5", "5"),  # a string stays one, whatever it looks like
        ("NATS__PASSWORD", "true", "true"),
        ("SERVER__PORT", "0", 0),
        ("ROUTING__DEADLINE_S", "5", 5.0),
        ("ROUTING__DEADLINE_S", "0.25", 0.25),
        ("NATS__BARE_INGEST", "false", False),
        ("ROUTING__DEFAULT_AGENTS", "[]", []),
        ("ROUTING__DEFAULT_AGENTS", '["legal"]', ["legal"]),
        ("TAXONOMY__MEMO", '{"definition": "a note"}', settings.Category("a note")),
        ("CARDS__LEGAL", '{"capabilities": ["law"]}', settings.Card(["law"])),
    ],
)
def test_an_environment_variable_becomes_the_type_its_setting_has(name, text, value):
    found = msgspec.structs.asdict(load(environ={f"HUBPEER_{name}": text}))
    for part in name.lower().split("__"):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_variables_of_other_programs_are_left_alone():
    assert load(environ={"HUB_DATA": "x", "PATH": "x", "hubpeer_data": "x"}) == Settings()


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        load(environ={}).server.port = 1


# ── what is refused, and where it says that was ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [", "Invalid value"),
        ("colour = 'red'", "unknown field `colour`"),
        ("[nats]\nurll = 'x'", "unknown field `urll` - at `$.nats`"),
        ("nats = 5", "Expected `object`, got `int` - at `$.nats`"),
        ("[server]\nport = '4222'", "Expected `int`, got `str` - at `$.server.port`"),
        ("[server]\nport = true", "Expected `int`, got `bool` - at `$.server.port`"),
        ("[server]\nport = 65536", "<= 65535 - at `$.server.port`"),
        ("[routing]\ndeadline_s = 0", "> 0.0 - at `$.routing.deadline_s`"),
        ("[routing]\ndeadline_s = nan", "at `$.routing.deadline_s`"),
        ("[plans]\nack_wait_s = inf", "at `$.plans.ack_wait_s`"),
        ("log = 'loud'", "'loud' - at `$.log`; one of: debug, info, warning, error"),
        ("[model]\ndtype = 'int4'", "one of: int8, bf16, fp32"),
        (
            "[routing]\nconflict_rules = ['dice']",
            "at `$.routing.conflict_rules[0]`; one of: finance_priority, consensus_required, ceo_decides",
        ),
        ("[routing]\nconflict_rules = ['ceo_decides']", "routing.default_rule must be one of routing.conflict_rules"),
        ("[routing]\ndefault_agents = ['The Boss']", "'The Boss' cannot be an agent's name"),
        ("[cards.legal]\ncapabilities = []", "length >= 1 - at `$.cards[...].capabilities`"),
        ("[cards.legal]\ncapabilities = ['law']\ncolour = 1", "unknown field `colour`"),
        ("[cards.'le gal']\ncapabilities = ['law']", "'le gal' cannot be an agent's name"),
        ("[taxonomy.Memo]\ndefinition = 'a note'", "'Memo' cannot be a category's name"),
        ("[taxonomy.memo]\ndefinition = ''", "length >= 1 - at `$.taxonomy[...].definition`"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_what_is_wrong(text, said):
    message = refused(toml(text))
    assert message.startswith("other.toml: ")
    assert said in message


def test_a_named_file_that_cannot_be_read_is_refused():
    assert refused(Path("missing.toml")) == "missing.toml: No such file or directory"
    Path("latin.toml").write_bytes(b"data = '\xe4'")
    assert refused(Path("latin.toml")).startswith("latin.toml: ")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("HUBPEER_SERVR__PORT", "1", "unknown field `servr`"),
        ("HUBPEER_SERVER__PROT", "1", "unknown field `prot`"),
        ("HUBPEER_SERVER__PORT", "many", "Expected `int`, got `str` - at `$.server.port`"),
        ("HUBPEER_NATS__BARE_INGEST", "False", "Expected `bool`, got `str`"),
        ("HUBPEER_DATA__DIR", "x", "data is not a table"),  # a setting of its own
        ("HUBPEER_LOG__LEVEL", "x", "Expected `str`, got `object` - at `$.log`"),
        ("HUBPEER_NATS", "x", "Expected `object`, got `str` - at `$.nats`"),
        ("HUBPEER_LOG", "loud", "one of: debug, info, warning, error"),
        ("HUBPEER_", "1", "unknown field ``"),
    ],
)
def test_a_wrong_environment_variable_is_refused_by_its_name(name, text, said):
    message = refused(environ={"HUBPEER_DATA": "fine", name: text})
    assert message.startswith(f"{name}: ")
    assert said in message


@pytest.mark.parametrize(
    ("dotted", "value", "origin"),
    [("server.port", "x", "--server-port"), ("serve.port", 1, "--serve-port"), ("colour", "red", "--colour")],
)
def test_a_wrong_override_is_refused_by_the_option_it_came_from(dotted, value, origin):
    assert refused(overrides={dotted: value}).startswith(f"{origin}: ")


def test_a_password_never_shows_in_an_error():
    assert "hunter2" not in refused(toml("[nats]\npassword = 'hunter2'\nport = 1"), {"HUBPEER_NATS__TOKEN": "hunter2"})
