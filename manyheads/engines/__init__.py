"""How forms are computed. Each engine is a module with

    why_not(form, x) -> str | None      what it cannot honour, or None
    hesitates(form, x) -> str | None    why it is not taken unasked, though it could run
    GIVES_LSE                           whether run's second value is the lse
    run(form, x) -> (o, lse | state)    o [batch, heads, q_len, v_head_dim] in q's dtype; lse natural, float32 or wider

Engines never import each other.
"""
