"""``umbel claims``: what is claimed is listed, and freed by hand."""

from __future__ import annotations

import json

from cluster import Cluster


def test_claims_are_listed_and_freed(cluster: Cluster) -> None:
    sent = cluster.send("note", 1, unique="until_done", unique_key="k")
    lock = cluster.app.lock("door", lease=3600)
    lock.acquire()
    listed = cluster.umbel("claims", "list").stdout.splitlines()
    assert listed[0].split() == ["KIND", "NAME", "HOLDER", "STATE", "LEFT"]
    assert [line.split()[:2] for line in listed[1:]] == [["unique", "shop.note:k"], ["lock", "door"]]
    assert sent.id in listed[1]
    (key, door) = json.loads(cluster.umbel("claims", "list", "--json").stdout)
    assert (key["kind"], key["owner"], key["state"], key["holder"]) == ("unique", sent.id, "waits", sent.id)
    assert (door["kind"], door["fence"], door["state"]) == ("lock", lock.fence, "held")
    assert json.loads(cluster.umbel("claims", "list", "do", "--json").stdout) == [door]

    asked = cluster.umbel("claims", "release", "lock", "door")
    assert (asked.returncode, "give --yes" in asked.stderr) == (2, True)
    freed = cluster.umbel("claims", "release", "lock", "door", "--yes")
    assert (freed.returncode, freed.stdout) == (0, "freed the lock door\n"), freed.stderr
    again = cluster.umbel("claims", "release", "lock", "door", "--yes")
    assert (again.returncode, "nobody has the lock 'door'" in again.stderr) == (1, True)
    assert cluster.umbel("claims", "release", "unique", "shop.note:k", "--yes").returncode == 0
    assert cluster.send("note", 1, unique="until_done", unique_key="k").sent
