"""Deploy one model on the cluster, as an operator does; run by the server's Python: deploy.py FOLDER KEY ACTOR."""

from __future__ import annotations

import sys

from ndif.cli.lib.deploy import deploy

if __name__ == "__main__":
    folder, key, actor = sys.argv[1:]
    # With its size stated it is deployed although ndif 0.1.2 cannot describe it with nnsight 0.8.1.
    sizes = {"size_bytes": 1 << 20, "padding_bias": 0, "dtype": "float32"}
    outcome = deploy(
        [{"checkpoint": folder, "model_key": key, "actor_class": actor, "trusted": True, "pinned": True, **sizes}],
        on_message=print,
    )
    if any(entry.get("status") != "READY" for entry in outcome["deployments"]):
        sys.exit(f"not deployed: {outcome}")
