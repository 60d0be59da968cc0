"""The report of `fuse`: what was found in a program, and what was done about it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """An inverse transform: where it is, the operator that replaced its chain, or "" and the reason why none did."""

    where: str
    operator: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {f'is now {self.operator}' if self.operator else f'left alone: {self.reason}'}"


@dataclass
class FuseReport:
    """The findings of `fuse`, in the program's order; ``print`` shows one line for each."""

    found: list[Finding] = field(default_factory=list)

    @property
    def fused(self) -> list[Finding]:
        return [finding for finding in self.found if finding.operator]

    @property
    def left_alone(self) -> list[Finding]:
        return [finding for finding in self.found if not finding.operator]

    def __str__(self) -> str:
        if not self.found:
            return "nothing to fuse; expected torch.fft.irfft2 of rfft2's result times filters"
        return "\n".join([f"fused {len(self.fused)} of {len(self.found)}", *map(str, self.found)])
