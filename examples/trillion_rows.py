"""What bounds a trillion rows of the jets network on a hundred nodes of eight H200: a plan, no such node was run."""

import timeit

from nnfwd.benchmark.cases import PUBLISHED

# A node: bytes a second in and out, FLOP/s by bytes of a number.
ONE = 40e9, 20e9  # vendor's: shared storage to one node (NVIDIA, DGX SuperPOD RA-11333-001 V11, "best" of table 6)
ALL = 500e9, 250e9  # vendor's: to all nodes together (the same table, for four units of 32 nodes)
NVME = 8 * 13e9, 8 * 6.6e9  # vendor's: eight drives in the node (Samsung's announcement of the PM1743)
PCIE = 8 * 54.8e9, 8 * 46.8e9  # seen on eight H100, PCIe 5.0 x16 too (github.com/aigatech/vpbenchmarking)
HBM = 8 * 4.3e12  # seen on an H200, not by this program
FLOPS = {2: 8 * 780e12, 4: 8 * 52e12}  # 16 bits: seen there, of large products; float32: assumed, NOT measured

net, x = PUBLISHED["jets"].build(1_000_000)
widths = [net.in_features, *(len(layer.weight) for layer in net)]
numbers = 2 * sum(widths) - widths[0] - widths[-1]  # a launch a layer: each reads and writes its rows once
flops = 2 * sum(layer.weight.size for layer in net)
plans = [(1e9 / 64, 1, 4, "memory"), (1e6, 1, 4, "shared"), (1e9, 1, 4, "shared"), (1e9, 100, 4, "shared")]
plans += [(1e12, 1, 4, "shared")] + [(1e12, 100, size, at) for at in ("shared", "NVMe", "cards") for size in (4, 2)]


def way(rate, size=4):  # seconds a row: in, then out, as if one waited for the other
    return size * (widths[0] / rate[0] + widths[-1] / rate[1])


print("   rows  nodes  bits  x in      storage       PCIe        HBM arithmetic  bottleneck (times in seconds)")
for rows, nodes, size, where in plans:
    storage = {"shared": max(way(ONE, size) / nodes, way(ALL, size)), "NVMe": way(NVME, size) / nodes}.get(where, 0)
    bus = way(PCIE, size) / nodes if where != "cards" else 0
    times = [rows * t for t in (storage, bus, size * numbers / HBM / nodes, flops / FLOPS[size] / nodes)]
    bound = ("storage", "PCIe", "HBM", "arithmetic")[times.index(max(times))]
    print(f"{rows:7.1e} {nodes:6} {8 * size:5}  {where:6}", *(f"{t:10.2g}" for t in times), "", bound)
run = net.compile()
rate = len(x) / min(timeit.repeat(lambda: run(x), number=1))
nodes, share = way(ONE) / way(ALL), way(ALL) / way(PCIE)
print(f"{nodes:.1f} nodes take all that the storage gives; one node's PCIe would take {share:.2f} of it.")
print(f"These cores, on rows in memory: {rate:.1e} rows/s; {1 / way(ALL) / rate:.1g} such machines keep up.")
