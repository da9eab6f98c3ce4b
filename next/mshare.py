"""Share of the matrix products in fork and in update: the recorded products replayed beside each."""
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from statistics import mean, stdev, median
import arcopo
from arcopo import *
from arcopo import branch_noise, fork, update, draw_noise
from reward import TRAIN_PROMPTS
aten = torch.ops.aten
PROD = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
CONV = {aten.convolution.default, aten.convolution_backward.default}
class Rec(TorchDispatchMode):
    def __init__(self): super().__init__(); self.calls=[]
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f in PROD or f in CONV:
            desc=[(a.shape,a.stride(),a.dtype) if isinstance(a,torch.Tensor) else a for a in args]
            self.calls.append((f,desc,kwargs or {}))
        return f(*args,**(kwargs or {}))
def make(d):
    if isinstance(d,tuple) and len(d)==3 and isinstance(d[0],torch.Size):
        n=1+sum((s-1)*t for s,t in zip(d[0],d[1])) if all(d[0]) else 0
        return torch.randn(max(n,0)).as_strided(d[0],d[1])
    return d
model=load_generator()
m=Method()
ad=Adapter.new(model,16,32.0,seeded(0))
opt=torch.optim.AdamW(ad.parameters(),1e-4,weight_decay=0,fused=True)
noise=draw_noise(model,4,seeded(1)); rewards=torch.randn(4,12,generator=seeded(0))
own=[branch_noise(noise,p,0.5,12,seeded(2)) for p in range(4)]
def ex(p):
    with torch.no_grad(), ad.on(model): return fork(model,TRAIN_PROMPTS[:4],p,noise,*own[p])[0]
res={}
for p in (0,1,2,3):
    f=ex(p)
    for name,call in (("fork",lambda: ex(p)),("update",lambda: update(model,ad,opt,f,rewards,m,seeded(3)))):
        rec=Rec()
        with rec: call()
        for kind,S in (("products",PROD),("with conv",PROD|CONV)):
            calls=[c for c in rec.calls if c[0] in S]
            cache={}
            prepared=[]
            for fn,desc,kw in calls:
                key=(str(fn),str(desc))
                if key not in cache: cache[key]=[make(d) for d in desc]
                prepared.append((fn,cache[key],kw))
            def rep():
                with torch.no_grad():
                    for fn,a,kw in prepared: fn(*a,**kw)
            call();rep()
            for _ in range(5):
                t=time.perf_counter();call();a=time.perf_counter()-t
                t=time.perf_counter();rep();b=time.perf_counter()-t
                res.setdefault((name,kind),[]).append((a,b))
for k,v in res.items():
    r=[b/a for a,b in v]
    print(k,f"{mean(r):.3f} ± {stdev(r):.3f}", f"seconds {median(a for a,b in v):.3f} products {median(b for a,b in v):.3f}")
for kind in ("products","with conv"):
    r=[(b1+b2)/(a1+a2) for (a1,b1),(a2,b2) in zip(res["fork",kind],res["update",kind])]
    print("fork+update",kind,f"{mean(r):.3f} ± {stdev(r):.3f}")
