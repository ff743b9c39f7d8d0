from ipaddress import ip_network

from nodeagent.net.addresses import Subnet
from nodeagent.net.network import NetworkConfig
from nodeagent.net.setup import Plan, with_choice
from nodeagent.records import NodeNetwork

DEFAULT = ip_network(NetworkConfig().subnet4)
WITHIN = ip_network("10.88.7.0/24")
DUAL = NetworkConfig(subnet6="fd00::/64")


def plan(
    config: NetworkConfig | None = None,
    choices: NodeNetwork | None = None,
    held: tuple[Subnet, ...] = (),
) -> Plan:
    return Plan(
        config=config or NetworkConfig(),
        instance="0a1b2c3d",
        choices=choices or NodeNetwork(),
        held=held,
    )


def test_names_come_from_the_instance_or_the_configuration() -> None:
    assert plan().bridge == "na0a1b2c3d"
    assert plan(NetworkConfig(bridge="pods0")).bridge == "pods0"
    assert plan().mac.hex() == "0a6f0a1b2c3d"


def test_configured_subnets_are_used_where_nothing_is_in_the_way() -> None:
    others = [ip_network("10.0.0.0/24"), ip_network("192.0.2.0/24")]
    assert plan(DUAL).subnets(others, 0) == (DEFAULT, ip_network("fd00::/64"))
    assert plan(NetworkConfig(subnet4="", subnet6="fd00::/64")).subnets([], 0) == (
        ip_network("fd00::/64"),
    )


def test_default_subnet_gives_way() -> None:
    (moved,) = plan().subnets([WITHIN], 0)
    assert not moved.overlaps(DEFAULT)
    assert plan().subnets([WITHIN], 1) != (moved,)


def test_a_default_subnet_that_gave_way_is_told_with_the_reason() -> None:
    free = ip_network("172.16.0.0/20")
    told = plan().moved([free], [ip_network("192.0.2.0/24"), WITHIN])
    assert told.startswith(
        f"pods get addresses of {free}, not of the default {DEFAULT}, which overlaps the node's route to {WITHIN}"
    )
    assert "overlapped a route when they were chosen" in plan().moved([free], [])


def test_a_subnet_that_somebody_asked_for_is_not_told() -> None:
    free = ip_network("172.16.0.0/20")
    assert plan().moved([DEFAULT], []) == ""
    assert plan(NetworkConfig(subnet4="172.16.0.0/20")).moved([free], [WITHIN]) == ""
    assert plan(choices=NodeNetwork(pod_cidrs=(str(free),))).moved([free], [WITHIN]) == ""
    six = NetworkConfig(subnet4="", subnet6="fd00::/64")
    assert plan(six).moved([ip_network("fd00::/64")], [WITHIN]) == ""


def test_configured_subnet_stays() -> None:
    config = NetworkConfig(subnet4="10.1.0.0/16")
    assert plan(config).subnets([ip_network("10.0.0.0/8")], 0) == (ip_network("10.1.0.0/16"),)


def test_choice_is_kept_while_it_is_free_or_has_pods() -> None:
    first = plan()
    (moved,) = first.subnets([WITHIN], 0)
    choices = with_choice(NodeNetwork(), first.config.subnet4, (moved,))
    assert plan(choices=choices).subnets([], 7) == (moved,)
    assert plan(choices=choices).subnets([moved], 7) != (moved,)
    assert plan(choices=choices, held=(moved,)).subnets([moved], 7) == (moved,)


def test_other_configuration_is_another_choice() -> None:
    choices = with_choice(NodeNetwork(), "10.5.0.0/16", (ip_network("10.5.0.0/16"),))
    assert plan(choices=choices).subnets([], 0) == (DEFAULT,)


def test_pod_cidr_goes_before_the_configuration_and_never_moves() -> None:
    choices = NodeNetwork(pod_cidrs=("10.7.0.0/24", "fd00:7::/64"))
    others = [ip_network("10.0.0.0/8")]
    assert plan(choices=choices).subnets(others, 0) == (ip_network("10.7.0.0/24"),)
    assert plan(DUAL, choices).subnets(others, 0) == (
        ip_network("10.7.0.0/24"),
        ip_network("fd00:7::/64"),
    )
    assert with_choice(choices, "10.88.0.0/16", (ip_network("10.7.0.0/24"),)) == choices


def test_pod_cidr_of_one_family_leaves_the_other() -> None:
    choices = NodeNetwork(pod_cidrs=("fd00:7::/64",))
    assert plan(DUAL, choices).subnets([], 0) == (DEFAULT, ip_network("fd00:7::/64"))
