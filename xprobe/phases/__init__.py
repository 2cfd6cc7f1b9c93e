"""From readiness curves to phases, their stability and their agreement across languages."""
