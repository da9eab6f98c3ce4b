"""analysis.py FOLDER: numbers that the sentences of EVIDENCE and README use"""
import csv, sys
from statistics import mean, stdev
from pathlib import Path
D=Path(sys.argv[1])
R=list(csv.DictReader(open(D/"results.csv"))); C=list(csv.DictReader(open(D/"curves.csv")))
def pick(run,model): return {r["seed"]:r for r in R if r["run"]==run and r["model"]==model}
def sp(v): return f"{mean(v):+.3f}±{stdev(v) if len(v)>1 else 0:.3f} ({min(v):+.3f} to {max(v):+.3f}; n={len(v)})"
def delta(run,model,col,base="base"):
    a,b=pick(run,model),pick(run,base); return {s:float(a[s][col])-float(b[s][col]) for s in a if s in b}
def rel(run,model,col):
    a,b=pick(run,model),pick(run,"base"); return {s:float(a[s][col])/float(b[s][col])-1 for s in a if s in b}
def show(title,d):
    if d: print(f"  {title:55} {sp(list(d.values()))}")
def curve(run,training,col,step):
    x={r["seed"]:float(r[col]) for r in C if r["run"]==run and r["training"]==training and r["step"]==str(step)}
    o={r["seed"]:float(r[col]) for r in C if r["run"]==run and r["training"]==training and r["step"]=="0"}
    return {s:x[s]-o[s] for s in x}
hi="higher times" if any("higher" in r["run"] for r in R) else "distilled times"
print("C2")
for t in ("",", "+hi):
    for run,m in (("AR-CoPO","on-policy"),("SDE-GRPO","sde-grpo")):
        for col in ("reward","judge","all_right"): show(f"{run}{t} Δ{col}",delta(run+t,m,col))
        for st in (20,40,60): show(f"{run}{t} curve Δreward at {st}",curve(run+t,m,"reward",st))
    a,s=delta("AR-CoPO"+t,"on-policy","reward"),delta("SDE-GRPO"+t,"sde-grpo","reward")
    if a and s: print("   ratio of means SDE/AR reward",mean(s.values())/mean(a.values()))
print("C3/C6 recipe")
M=["semi","s = 0.4","s = 0.6","s = 0.8","s = 1","s = 1.5","s = 2","on-policy x 0.4","on-policy x 0.6","on-policy x 0.8","on-policy","on-policy x 1.5","on-policy x 2"]
for run in ("recipe","recipe, on-policy without TA"):
    print(run)
    for m in M:
        show(m+" Δreward",delta(run,m,"reward")); show(m+" Δjudge",delta(run,m,"judge")); show(m+" Δall right",delta(run,m,"all_right"))
    for m in ("s = 1","on-policy","s = 2"):
        for col in ("area","displacement","spread","visual","motion_quality","text"): show(m+" rel "+col,rel(run,m,col))
    # equal reward, by seed: interpolate scaled on-policy at the reward of merged s
    S=[("base",0),("on-policy x 0.4",.4),("on-policy x 0.6",.6),("on-policy x 0.8",.8),("on-policy",1),("on-policy x 1.5",1.5),("on-policy x 2",2)]
    for m in ("s = 0.4","s = 0.6","s = 0.8","s = 1","s = 1.5","s = 2"):
        for col in ("all_right","judge"):
            diff=[]
            for s,row in pick(run,m).items():
                pts=[(float(pick(run,n)[s]["reward"]),float(pick(run,n)[s][col])) for n,_ in S if s in pick(run,n)]
                x=float(row["reward"]); y=None
                for (x0,y0),(x1,y1) in zip(pts,pts[1:]):
                    if min(x0,x1)<=x<=max(x0,x1) and x0!=x1: y=y0+(y1-y0)*(x-x0)/(x1-x0); break
                if y is not None: diff.append(float(row[col])-y)
            if diff: print(f"   at equal reward {m} {col}: {sp(diff)} "+" ".join(f"{d:+.3f}" for d in diff))
    # rule
    for seeds in [sorted({r['seed'] for r in R if r['run']==run})]:
        for s in seeds:
            b=pick(run,"base")[s]; ok=[k for k in (0.4,.6,.8,1,1.5,2) if (q:=pick(run,f"s = {k:g}").get(s)) and float(q["reward"])>float(b["reward"]) and float(q["judge"])>float(b["judge"])]
            print("   rule seed",s,"improves both:",ok)
print("C4/C5")
for run,m in (("TA alone","on-policy"),("TA alone, 4 times the rate","on-policy"),("semi","semi"),("off-policy","semi"),("semi, 25 times the rate","semi"),("semi, 25 times the rate, ε 1e-6","semi"),("off-policy, 25 times the rate","semi")):
    for col in ("ta","judge","all_right","visual","motion_quality"): show(f"{run} Δ{col}",delta(run,m,col))
    for col in ("spread","displacement","area"): show(f"{run} rel {col}",rel(run,m,col))
    if "off-policy, 25" in run or "semi, 25" in run:
        for st in (20,40,60,100): show(f"{run} curve Δ all_right {st}",curve(run,m,"all_right",st))
print("C7")
for run in ("flow matching","right captions"):
    for col in ("reward","judge","all_right"): show(f"{run} Δ{col}",delta(run,"on-policy",col))
print("settings")
for run in dict.fromkeys(r["run"] for r in R if r["run"].startswith("--") or r["run"]==""):
    for col in ("judge","all_right"): show(f"{run or 'defaults'} Δ{col}",delta(run,"on-policy",col))
