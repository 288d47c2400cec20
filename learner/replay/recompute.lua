-- Sum the weights anew; returns the total as text.
run_also_when_full()
return exact(refresh())
