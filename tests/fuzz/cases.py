"""One fuzz case: a target and a seed, from which everything follows."""

import math

from fuzz import check, modules, ops
from fuzz.draw import MODES, Draw

#: What can be fuzzed: ops by name, then layers and flows by name.
TARGETS = {
    **{f"ops.{name}": name for name in ops.CALLS},
    **{name: name for name in modules.MODULES},
}
RULES = ("values", "isolation", "hostile")


def run_case(target, seed, *, crashes_only=False):
    """Run one case; raises ``check.Finding`` where a rule does not hold.

    With ``crashes_only`` the call is the same, but nothing is compared: neither with a reference nor with float64.
    """
    if not target.startswith("ops."):
        modules.run_case(TARGETS[target], seed, crashes_only=crashes_only)
        return
    rule = RULES[seed % len(RULES)]
    mode = "plain" if rule == "hostile" else MODES[seed // len(RULES) % len(MODES)]
    draw = Draw(seed, mode)
    call = ops.CALLS[TARGETS[target]](draw)
    if rule == "values":
        check.outcome_of(call) if crashes_only else check.check_values(call, mode)
    elif rule == "isolation":
        poison = draw.choice((math.nan, math.inf, -math.inf))
        if crashes_only:
            check.outcome_of(call, poison)
        else:
            check.check_isolation(call, poison)
    elif crashes_only:
        check.hostile_outcome(*check.made_hostile(call, draw))
    else:
        check.check_hostile(call, draw)
