from nodeagent.net.stats import InterfaceStats, parse

# Columns of proc(5), /proc/net/dev: eight counters received, eight sent.
DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier
    lo:   10       1    0    0    0     0          0         0       10       1    0    0    0     0       0          0
nv0a1b2c3d00001: 1 2 3 4 5 6 7 8 11 12 13 14 15 16 17 18
nv0a1b2c3d00002:100 0 0 0 0 0 0 0 4294967296000 0 0 0 0 0 0 0
nvffffffff00001: 1 2 3 4 5 6 7 8 11 12 13 14 15 16 17 18
"""


def test_pod_received_what_the_node_sent() -> None:
    found = dict(parse(iter(DEV.splitlines(keepends=True)), "nv0a1b2c3d"))
    assert found.keys() == {"nv0a1b2c3d00001", "nv0a1b2c3d00002"}
    assert found["nv0a1b2c3d00001"] == InterfaceStats(
        name="eth0",
        rx_bytes=11,
        rx_packets=12,
        rx_errors=13,
        rx_dropped=14,
        tx_bytes=1,
        tx_packets=2,
        tx_errors=3,
        tx_dropped=4,
    )


def test_counter_may_follow_the_colon_at_once_and_be_long() -> None:
    found = dict(parse(iter(DEV.splitlines()), "nv0a1b2c3d00002"))
    assert found["nv0a1b2c3d00002"].tx_bytes == 100
    assert found["nv0a1b2c3d00002"].rx_bytes == 4294967296000
