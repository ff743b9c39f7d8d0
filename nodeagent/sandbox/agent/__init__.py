"""The agent's side of the protocol with launcher and supervisors; asyncio, and never a call that blocks the loop."""
