import os, sys, time
from tests.distributed.world import World
from tests.distributed import jobs
from tests.distributed.test_lag import lagging
from tests.distributed.test_policy import LAYOUTS, config_of
from tests.distributed import reference
from tests.costs import cpu_seconds
def new(config):
    m0=set(sys.modules)
    jobs.new_policy(config, config.model.path)
    return sorted(set(sys.modules)-m0)
def test_x(tiny_model):
    w=World()
    def go(name,f,size,**a):
        c0=cpu_seconds(os.getpid()); t=time.time()
        r=w.run(f,size,**a)
        time.sleep(.3)
        print(name,size,"cpu",round(cpu_seconds(os.getpid())-c0,2),"clock",round(time.time()-t,1),flush=True)
        return r
    go("noop",noop,1)
    for s in (1,2,4,8): go("noop",noop,s)
    p=tiny_model("qwen2")
    for l in ("plain","tp2-sp","pp2-vpp2"):
        n,o=LAYOUTS[l]; c=config_of(p,**o)
        r=go("new_policy "+l,new,n,config=c)
        print(r[0][:60])
        r=go("lagging "+l,lagging,n,config=c,samples=reference.minibatch(1, vocab=101))
    r=go("mods",mods,1)
    print(r)
def noop(): return 0
def mods():
    return sorted(m for m in sys.modules if m.startswith(("tests","pytest","_pytest")))[:200]
