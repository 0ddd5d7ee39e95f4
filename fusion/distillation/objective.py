"""What the student is to match: its errors on the teacher's answers, the loss of a batch, and the gradients of that.

Shapes: P prompts, T text positions, C concepts, L layers.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from fusion.distillation.config import DistillationConfig
from fusion.distillation.student import Student
from fusion.distillation.teacher import Answers, Teacher
from fusion.methods.distill import distillation_loss, layer_errors, prompt_scales
from fusion.models.float32_layers import computes_in
from fusion.spectral.delta import Delta

PART_BYTES = 2**30  # of what is kept for the gradients of a part of a batch


class Objective:
    """Before `loss` and `add_gradients`, `scales` (C, L) are set: how much each concept changes each layer's output,
    SDXL's pooled embedding the last of the layers.
    """

    scales: Tensor

    def __init__(self, teacher: Teacher, student: Student, config: DistillationConfig) -> None:
        self.teacher, self.student, self.config = teacher, student, config
        unet = teacher.pipe.unet
        # bfloat16 for a base in half precision, unless a CPU is slow at it; the weights that learn are float32.
        device, half = unet.device.type, unet.dtype != torch.float32
        self._autocasts = half and (device != "cpu" or computes_in(torch.bfloat16))
        self._autocast = torch.autocast(device, torch.bfloat16) if self._autocasts else nullcontext()

    def errors(self, answers: Answers) -> tuple[list[Tensor], Tensor | None]:
        """The student's errors (P,) in every layer, and in SDXL's pooled embedding."""
        with self._autocast:
            encoded = self.student.encode(answers.ids)
            states, target = encoded.states.float(), answers.states.float()
            rows, acts = self.teacher.rows(answers.owners)
            at_rows = target.flatten(0, 1)[rows]
            errors = list[Tensor]()
            for layer, weight in self.student.weights.items():
                gated = self.teacher.gated(layer, (weight.shape[0], weight.shape[1]), at_rows, acts)
                lora, weight = self.student.loras[layer], weight if self._autocasts else weight.float()
                errors.append(layer_errors(weight, Delta(lora.up, lora.down), states, target, rows, gated))
        if encoded.pooled is None or answers.pooled is None:
            return errors, None
        return errors, (encoded.pooled.float() - answers.pooled.float()).square().mean(dim=1)

    def loss(self, answers: Answers) -> Tensor:
        """The mean over prompts, a scalar."""
        errors, pooled = self.errors(answers)
        scales = prompt_scales(self.scales, self.teacher.presence(answers.owners), self.config.free_weight)
        loss = distillation_loss(errors, scales[:, : len(errors)])
        if pooled is not None:
            loss = loss + self.config.pooled_weight * distillation_loss([pooled], scales[:, -1:])
        return loss

    def add_gradients(self, answers: Answers) -> float:
        """Add the loss's gradients, computed in as many parts as keep each within PART_BYTES; returns the loss."""
        total, prompts, positions = 0.0, *answers.states.shape[:2]
        for part in answers.split(-(-prompts * positions * self.student.position_bytes // PART_BYTES)):
            loss = self.loss(part) * (len(part.states) / prompts)
            loss.backward()
            total += float(loss.detach())
        return total
