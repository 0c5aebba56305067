package main

import (
	"context"
	"fmt"
	"os"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const scriptTimeout = time.Second

// newArgo sets up the Lua interpreter that Argo CD uses, as Argo CD's package util/lua does, which is not imported: it brings
// Argo CD's API types and GitOps engine along. The resource is the global obj, a second is all the time there is, and of the
// libraries there are base and table, not string, math or io. What Argo CD gives scripts beside (package, and date and time
// of os) is left out: a script that needs it fails here.
func newArgo(file string) (Engine, error) {
	script, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return func(resource *unstructured.Unstructured) (Verdict, error) { return runLua(string(script), resource) }, nil
}

func runLua(script string, resource *unstructured.Unstructured) (Verdict, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable} {
		call := lua.P{Fn: state.NewFunction(open), Protect: true}
		if err := state.CallByParam(call, lua.LString(name)); err != nil {
			return Verdict{}, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), scriptTimeout)
	defer cancel()
	state.SetContext(ctx)
	state.SetGlobal("obj", toLua(state, resource.Object))
	if err := state.DoString(script); err != nil {
		return Verdict{}, err
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return Verdict{}, fmt.Errorf("the script returned %s, not a table", state.Get(-1).Type())
	}
	status, isStatus := table.RawGetString("status").(lua.LString)
	message, isMessage := table.RawGetString("message").(lua.LString)
	if !isStatus || !isMessage {
		return Verdict{}, fmt.Errorf("status and message are no strings")
	}
	return Verdict{string(status), string(message)}, nil
}

func toLua(state *lua.LState, value any) lua.LValue {
	switch value := value.(type) {
	case bool:
		return lua.LBool(value)
	case string:
		return lua.LString(value)
	case int64:
		return lua.LNumber(value)
	case float64:
		return lua.LNumber(value)
	case []any:
		list := state.NewTable()
		for _, item := range value {
			list.Append(toLua(state, item))
		}
		return list
	case map[string]any:
		table := state.NewTable()
		for key, item := range value {
			table.RawSetString(key, toLua(state, item))
		}
		return table
	default:
		return lua.LNil
	}
}
