"""Who counts as being there."""

from headrace.engine.scheduler.tenants import EXPECTED_S, Tenants


def test_a_tenant_shares_the_engine_while_another_is_there_or_was_of_late():
    tenants = Tenants()
    tenants.arrive("one")
    assert not tenants.shared(100.0)
    tenants.arrive("other")
    assert tenants.shared(100.0)
    tenants.leave("other", 100.0)
    assert tenants.shared(100.0 + EXPECTED_S / 2)
    assert not tenants.shared(101.0 + EXPECTED_S)
    tenants.leave("one", 140.0)
    assert not tenants.shared(140.0), "nobody is there"
    tenants.arrive("one")
    assert not tenants.shared(141.0), "it left last, but that it comes back makes it no other"
