-- Health of a TrainingRun for Argo CD (resource.customizations.health.training.heimdall.dev_TrainingRun).
local function condition(kind)
  if obj.status ~= nil and obj.status.conditions ~= nil then
    for _, item in ipairs(obj.status.conditions) do
      if item.type == kind then
        return item
      end
    end
  end
  return {}
end

local complete, failed, suspended = condition("Complete"), condition("Failed"), condition("Suspended")
if obj.metadata.deletionTimestamp ~= nil then
  return { status = "Progressing", message = "The run is being deleted." }
end
-- A finished run stays as it is, whatever becomes of its spec.
if complete.status == "True" then
  return { status = "Healthy", message = complete.message }
end
if failed.status == "True" then
  return { status = "Degraded", message = failed.reason .. ": " .. failed.message }
end
if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "Waiting for the operator to see this version." }
end
if suspended.status == "True" then
  return { status = "Suspended", message = suspended.message }
end
if obj.status.phase == "Running" then
  local progress = obj.status.progress
  if progress ~= nil and progress.percent ~= nil then
    return { status = "Progressing", message = "Training: " .. progress.percent .. " %." }
  end
  return { status = "Progressing", message = "Training." }
end
return { status = "Progressing", message = complete.message or "Pending." }
