"""Actors that own the shards of a served model: protocol, data plane, supervision."""
