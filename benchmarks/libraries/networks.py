"""The networks that the certifier is measured on, of all libraries."""

from __future__ import annotations

import orthogonium_networks
import torch_networks
import torchlip_networks
from forms import Network

# The place of a network in this list is the seed of its weights.
NETWORKS: list[Network] = [
    *torchlip_networks.NETWORKS,
    *orthogonium_networks.NETWORKS,
    *torch_networks.NETWORKS,
]
