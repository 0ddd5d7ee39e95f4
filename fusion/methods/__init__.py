"""Fusion methods: many changes of one weight become one. A new method is one file and one line here."""

from fusion.methods import dense, distill, gradient, knots, regression, sums
from fusion.methods.method import AdapterMerge, LayerMerge, Method, WeightedSum
from fusion.methods.method import MethodOptions as MethodOptions

METHODS: dict[str, Method] = {
    "direct_sum": WeightedSum(sums.direct_sum, "the sum; exact on disjoint slices", linear=True),
    "average": WeightedSum(sums.average, "the mean (FedAvg)", linear=True, idle_counts=True),
    "energy_balanced": WeightedSum(sums.energy_balanced, "the sum, as large as the strongest part"),
    "regression": LayerMerge(
        regression.merge,
        "least squares on what each adapter does on its own prompts",
        linear=True,
        moments=True,
        idle_counts=True,
    ),
    "gradient": LayerMerge(gradient.merge, "the same by LBFGS (Mix-of-Show); slow", moments=True, idle_counts=True),
    "ties": LayerMerge(dense.ties, "trim, elect signs, average what agrees (TIES)"),
    "dare": LayerMerge(dense.dare, "drop at random, rescale, add (DARE)"),
    "magnitude_prune": LayerMerge(dense.magnitude_prune, "trim, add"),
    "knots": LayerMerge(knots.merge, "TIES in the directions the changes share (KnOTS)"),
    "distill": AdapterMerge(
        distill.distillation_loss, "a plain LoRA learns what gated adapters do, from prompts; slow"
    ),
}
