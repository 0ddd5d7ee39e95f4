"""Fusion methods: many changes of one weight become one. A new method is one file and one line here."""

from fusion.methods.average import average_method
from fusion.methods.direct_sum import direct_sum_method
from fusion.methods.method import FusionMethod

METHODS: dict[str, FusionMethod] = {
    "direct_sum": direct_sum_method,  # exact on disjoint slices
    "average": average_method,  # FedAvg
}
