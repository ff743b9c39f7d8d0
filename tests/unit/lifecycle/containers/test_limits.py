"""What limits add up to."""

from nodeagent.lifecycle.containers.groups import total
from nodeagent.requests import Resources


def test_a_pod_has_the_limits_of_its_containers_and_its_overhead() -> None:
    containers = Resources(cpu_quota_usec=50_000, cpu_shares=512, memory_limit_bytes=1000)
    overhead = Resources(cpu_quota_usec=10_000, cpu_shares=2, memory_limit_bytes=24)
    assert total(containers, overhead) == Resources(
        cpu_quota_usec=60_000, cpu_shares=514, memory_limit_bytes=1024
    )


def test_overhead_limits_nothing_alone() -> None:
    overhead = Resources(cpu_quota_usec=10_000, cpu_shares=2, memory_limit_bytes=24)
    for containers in (Resources(), Resources(cpu_quota_usec=-1, memory_limit_bytes=-1)):
        assert total(containers, overhead) == containers


def test_quotas_of_different_periods() -> None:
    containers = Resources(cpu_period_usec=50_000, cpu_quota_usec=50_000)
    overhead = Resources(cpu_quota_usec=10_000)
    assert total(containers, overhead).cpu_quota_usec == 55_000
