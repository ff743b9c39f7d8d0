"""How far in addresses and names are."""

import pytest

from nodeagent.images.remote.destinations import Scope, scope_of, scope_of_name


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        ("8.8.8.8", Scope.PUBLIC),
        ("172.32.0.1", Scope.PUBLIC),
        ("2606:4700::1", Scope.PUBLIC),
        ("::ffff:8.8.8.8", Scope.PUBLIC),
        ("64:ff9b::808:808", Scope.PUBLIC),
        ("10.0.0.1", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("172.31.255.255", Scope.PRIVATE),
        ("192.168.1.1", Scope.PRIVATE),
        ("240.0.0.1", Scope.PRIVATE),
        ("fd00::1", Scope.PRIVATE),
        ("::ffff:10.0.0.1", Scope.PRIVATE),
        ("2002:a00:1::", Scope.PRIVATE),
        ("64:ff9b:1::808:808", Scope.PRIVATE),
        ("0.0.0.0", Scope.NODE),
        ("127.0.0.1", Scope.NODE),
        ("169.254.169.254", Scope.NODE),
        ("168.63.129.16", Scope.NODE),
        ("100.100.100.200", Scope.NODE),
        ("224.0.0.1", Scope.NODE),
        ("255.255.255.255", Scope.NODE),
        ("::", Scope.NODE),
        ("::1", Scope.NODE),
        ("::127.0.0.1", Scope.NODE),
        ("::ffff:127.0.0.1", Scope.NODE),
        ("::ffff:0:127.0.0.1", Scope.NODE),
        ("64:ff9b::7f00:1", Scope.NODE),
        ("64:ff9b:1::7f00:1", Scope.NODE),
        ("2002:7f00:1::", Scope.NODE),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", Scope.NODE),  # Teredo, of 127.0.0.1
        ("fe80::1", Scope.NODE),
        ("fe80::1%eth0", Scope.NODE),
        ("ff02::1", Scope.NODE),
        ("fd00:ec2::254", Scope.NODE),
        ("2130706433", Scope.NODE),
        ("no address", Scope.NODE),
    ],
)
def test_addresses(address: str, scope: Scope) -> None:
    assert scope_of(address) is scope


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("registry.example", Scope.PUBLIC),
        ("127.0.0.1.example", Scope.PUBLIC),
        ("localhost.example", Scope.PUBLIC),
        ("", Scope.PUBLIC),
        ("167772161", Scope.PRIVATE),
        ("localhost", Scope.NODE),
        ("LocalHost.", Scope.NODE),
        ("a.localhost", Scope.NODE),
        ("127.1", Scope.NODE),
        ("0x7f.1", Scope.NODE),
        ("0177.0.0.1", Scope.NODE),
        ("017700000001", Scope.NODE),
        ("2852039166", Scope.NODE),
        ("127.0.0.1.", Scope.NODE),
        ("fe80::1%25eth0", Scope.NODE),
    ],
)
def test_names(name: str, scope: Scope) -> None:
    assert scope_of_name(name) is scope
