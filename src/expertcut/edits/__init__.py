"""What to change: criteria that rank experts, and the plan that says which go and which are tilted.

Nothing here touches a model's weights; `expertcut.checkpoints` carries a plan out.
"""
