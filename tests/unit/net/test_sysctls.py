from pathlib import Path

import pytest

from nodeagent.net import sysctls


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysctls, "ROOT", str(tmp_path))
    (tmp_path / "net/ipv4").mkdir(parents=True)
    (tmp_path / "net/ipv4/ip_forward").write_text("0\n")
    return tmp_path


def test_families_ask_for_their_forwarding_only() -> None:
    assert sysctls.of_node([4], ["eth0"]) == {"net/ipv4/ip_forward": "1"}
    assert sysctls.of_node([6], ["eth0.7"]) == {
        "net/ipv6/conf/eth0.7/accept_ra": "2",
        "net/ipv6/conf/all/forwarding": "1",
    }


def test_link_keeps_its_default_route_before_forwarding_is_on() -> None:
    assert list(sysctls.of_node([4, 6], ["eth0"]))[-2:] == [
        "net/ipv6/conf/eth0/accept_ra",
        "net/ipv6/conf/all/forwarding",
    ]


def test_what_differs_is_set_and_can_be_restored(settings: Path) -> None:
    wanted = sysctls.of_node([4], [])
    before = sysctls.differing(wanted)
    assert before == {"net/ipv4/ip_forward": "0"}
    sysctls.apply(wanted)
    assert sysctls.differing(wanted) == {}
    assert (settings / "net/ipv4/ip_forward").read_text() == "1"
    sysctls.restore(before)
    assert (settings / "net/ipv4/ip_forward").read_text() == "0"


def test_settings_of_a_link_that_is_gone_need_no_restoring(settings: Path) -> None:
    sysctls.restore({"net/ipv6/conf/gone/accept_ra": "1", "net/ipv4/ip_forward": "1"})
    assert (settings / "net/ipv4/ip_forward").read_text() == "1"


def test_kernel_without_ipv6_is_asked_for_nothing_of_it(settings: Path) -> None:
    assert not any("ipv6" in name for name in sysctls.of_bridge("na0", {4}, check_source=True))
    assert sysctls.of_port("nv0") == {}


def test_link_with_dots_in_its_name(settings: Path) -> None:
    (settings / "net/ipv6").mkdir()
    assert "net/ipv6/conf/na.0/accept_ra" in sysctls.of_bridge("na.0", {4}, check_source=True)


def test_bridge_has_ipv6_where_pods_have_it(settings: Path) -> None:
    (settings / "net/ipv6").mkdir()
    for versions, disabled in (({4}, "1"), ({6}, "0"), ({4, 6}, "0")):
        wanted = sysctls.of_bridge("na0", versions, check_source=True)
        assert wanted["net/ipv6/conf/na0/disable_ipv6"] == disabled
