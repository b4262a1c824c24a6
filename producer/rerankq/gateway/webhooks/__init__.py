"""Webhooks: whoever submitted a job is told of its end, at least once, whatever happens to a gateway.

:mod:`.targets` says which URLs and addresses may be told, :mod:`.message` what they are told and when again,
:mod:`.posting` sends it, :mod:`.delivering` takes deliveries from the ledger.
"""
