"""How forms are computed. Each engine is a module with

    why_not(form, x, lse) -> str | None what it cannot honour, or None; lse: whether the lse is asked for
    hesitates(form, x) -> str | None    why it is not taken unasked, though it could run
    run(form, x) -> (o, lse | state)    o [batch, heads, q_len, v_head_dim] in q's dtype; lse natural, float32 or wider

Engines never import each other.
"""
