"""join.py OUT: evA + evB -> OUT, in the order of RUNS; says what is missing"""
import csv, sys; sys.path.insert(0, "/tmp/me/code2")
from pathlib import Path
from studies.claims import RUNS
out=Path(sys.argv[1]); out.mkdir(exist_ok=True)
order={r.command:i for i,r in enumerate(RUNS)}
def read(f): return list(csv.DictReader(open(f,newline=""))) if Path(f).exists() else []
have=set()
for name in ("results.csv","curves.csv","base.csv","entropy.csv"):
    rows=[]; seen=set()
    for d in ("evA","evB","evC"):
        new=read(f"/tmp/me/{d}/{name}")
        keys={(r["command"],r["seed"]) for r in new}-seen
        rows+=[r for r in new if (r["command"],r["seed"]) in keys]; seen|=keys
    rows.sort(key=lambda r:(order[r["command"]],int(r["seed"])))
    if not name.startswith("curves"): have|={(r["command"],int(r["seed"])) for r in rows}
    cols=list(dict.fromkeys(c for r in rows for c in r))
    if rows:
        with open(out/name,"w",newline="",encoding="utf-8") as f:
            w=csv.DictWriter(f,cols,lineterminator="\n"); w.writeheader()
            w.writerows([{c:"" for c in cols}|r for r in rows])
    print(name,len(rows))
for r in RUNS:
    if r.name!="cost":
        miss=[s for s in (r.seeds or range(5)) if (r.command,s) not in have]
        if miss: print("missing",r.name,"|",r.command,miss)
