// Command argo-health tells what Argo CD's own package takes resources for:
//
//	argo-health HEALTH.LUA < RESOURCES.JSON
//
// Both are lists: of resources, and of statuses with their messages.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/gitops-engine/pkg/health"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: argo-health HEALTH.LUA < RESOURCES.JSON")
		os.Exit(2)
	}
	if err := judge(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "argo-health:", err)
		os.Exit(1)
	}
}

func judge(file string) error {
	script, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// As in argocd-cm, without useOpenLibs.
	override := v1alpha1.ResourceOverride{HealthLua: string(script)}
	var resources []unstructured.Unstructured
	if err := json.NewDecoder(os.Stdin).Decode(&resources); err != nil {
		return err
	}
	verdicts := make([]*health.HealthStatus, len(resources))
	for i := range resources {
		kind := resources[i].GroupVersionKind()
		overrides := lua.ResourceHealthOverrides{kind.Group + "/" + kind.Kind: override}
		if verdicts[i], err = overrides.GetResourceHealth(&resources[i]); err != nil {
			return fmt.Errorf("%s: %w", resources[i].GetName(), err)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(verdicts)
}
