"""One of the processes of test_group.py: the same exchanges on each, and what this one has of them, as JSON."""

import json
import sys

import torch

from squawq.backends.cpu.group import SharedGroup
from squawq.errors import RankError

rank, size, memory, capacity = map(int, sys.argv[1:5])
group, found = SharedGroup(rank, size, memory, capacity), []
widths = [3, 200, 1, 70][:size]
for number, count in enumerate([1, 64, 65, 1000, 7]):
    x = torch.randn(count, generator=torch.Generator().manual_seed(100 * number + rank))
    group.all_reduce(x)
    found.append(x.tolist())
    rows = torch.arange(5 * widths[rank], dtype=torch.float32).view(5, widths[rank]) + 1000 * rank
    found.append(group.gather(rows, widths).tolist())
print(json.dumps(found), flush=True)
sys.stdin.readline()
if rank:
    try:
        group.all_reduce(torch.zeros(4))
    except RankError:
        print("ended", flush=True)
